//! Documents: every database finds what a model finds, whatever is asked for.

mod storage;

use std::{collections::BTreeMap, sync::Arc};

use graph::{
    DocumentKey, DocumentStore, MemoryCheckpointer, Namespace,
    checkpoint::Checkpointer,
    documents::{DocumentWrite, Filter, NamespaceFilter, Order, Scalar, Search, Test},
};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};
use serde_json::{Map, Value, json};

/// How many rounds of random documents and searches each database plays.
const ROUNDS: usize = 12;

/// Values in the order of their type, and of the databases within: those of the same rank are equal.
fn ladder() -> Vec<(&'static str, u32, Value)> {
    vec![
        ("number", 0, json!(-1e300)),
        ("number", 1, json!(i64::MIN)),
        ("number", 2, json!(-10)),
        ("number", 2, json!(-10.0)),
        ("number", 3, json!(-9.5)),
        ("number", 4, json!(0)),
        ("number", 4, json!(0.0)),
        ("number", 5, json!(5e-324)),
        ("number", 6, json!(0.1)),
        ("number", 7, json!(1)),
        ("number", 8, json!(9)),
        ("number", 9, json!(10)),
        ("number", 10, json!(9_007_199_254_740_992_i64)),
        ("number", 10, json!(9_007_199_254_740_992.0)),
        ("number", 11, json!(9_007_199_254_740_993_i64)),
        ("number", 12, json!(i64::MAX)),
        ("number", 13, json!(u64::MAX - 1)),
        ("number", 14, json!(u64::MAX)),
        ("number", 15, json!(1e20)),
        ("text", 0, json!("")),
        ("text", 1, json!("\u{0}")),
        ("text", 2, json!("1")),
        ("text", 3, json!("10")),
        ("text", 4, json!("9")),
        ("text", 5, json!("A")),
        ("text", 6, json!("a")),
        ("text", 7, json!("a\u{0}")),
        ("text", 8, json!("a\u{0}b")),
        ("text", 9, json!("ab")),
        ("text", 10, json!("ä")),
        ("text", 11, json!("\u{d7ff}")),
        ("text", 12, json!("\u{fdd0}")),
        ("text", 13, json!("\u{fdd0}0")),
        ("text", 14, json!("\u{ffee}")),
        ("text", 15, json!("\u{10000}")),
        ("bool", 0, json!(false)),
        ("bool", 1, json!(true)),
        ("null", 0, json!(null)),
        ("list", 0, json!([1, "1"])),
        ("object", 0, json!({})),
    ]
}

fn rank(value: &Value) -> (&'static str, u32) {
    let found = ladder().into_iter().find(|(_, _, known)| known == value);
    found.map_or(("other", 0), |(kind, rank, _)| (kind, rank))
}

/// What the documentation says, in the plainest way.
fn holds(document: &Value, path: &[String], test: &Test) -> bool {
    let mut found = Some(document);
    for name in path {
        found = match found {
            Some(Value::Object(fields)) => fields.get(name),
            _ => None,
        };
    }
    if let Test::Exists(exists) = test {
        return found.is_some() == *exists;
    }
    let Some(found) = found else { return false };
    let (kind, place) = rank(found);
    let with = |scalar: &Scalar| {
        let (of, at) = rank(&plain(scalar));
        (of == kind && !["list", "object", "other"].contains(&kind)).then_some(at)
    };
    match test {
        Test::Eq(scalar) => with(scalar).is_some_and(|at| place == at),
        Test::Ne(scalar) => with(scalar).is_some_and(|at| place != at),
        Test::Gt(scalar) => with(scalar).is_some_and(|at| place > at),
        Test::Gte(scalar) => with(scalar).is_some_and(|at| place >= at),
        Test::Lt(scalar) => with(scalar).is_some_and(|at| place < at),
        Test::Lte(scalar) => with(scalar).is_some_and(|at| place <= at),
        Test::In(scalars) => scalars.iter().any(|scalar| with(scalar) == Some(place)),
        Test::Exists(_) => unreachable!("is above"),
    }
}

fn plain(scalar: &Scalar) -> Value {
    match scalar {
        Scalar::Null => Value::Null,
        Scalar::Bool(value) => json!(value),
        Scalar::Number(value) => Value::Number(value.clone()),
        Scalar::Text(value) => json!(value),
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    proptest::sample::select(ladder()).prop_map(|(_, _, value)| value)
}

fn any_scalar() -> impl Strategy<Value = Scalar> {
    any_value().prop_map(|value| match value {
        Value::Bool(value) => Scalar::Bool(value),
        Value::Number(value) => Scalar::Number(value),
        Value::String(value) => Scalar::Text(value),
        _ => Scalar::Null,
    })
}

fn any_name() -> impl Strategy<Value = String> {
    proptest::sample::select(vec!["a", "b", "0", "a.b", "ä"]).prop_map(str::to_owned)
}

fn any_document() -> impl Strategy<Value = Value> {
    let object = |value: BoxedStrategy<Value>| {
        proptest::collection::btree_map(any_name(), value, 0..4)
            .prop_map(|fields| Value::Object(fields.into_iter().collect::<Map<_, _>>()))
    };
    let inner = prop_oneof![3 => any_value(), 1 => object(any_value().boxed())];
    prop_oneof![8 => object(inner.boxed()), 1 => any_value()]
}

fn any_test() -> impl Strategy<Value = Test> {
    prop_oneof![
        any_scalar().prop_map(Test::Eq),
        any_scalar().prop_map(Test::Ne),
        any_scalar().prop_map(Test::Gt),
        any_scalar().prop_map(Test::Gte),
        any_scalar().prop_map(Test::Lt),
        any_scalar().prop_map(Test::Lte),
        proptest::collection::vec(any_scalar(), 0..4).prop_map(Test::In),
        any::<bool>().prop_map(Test::Exists),
    ]
}

fn any_condition() -> impl Strategy<Value = (Vec<String>, Test)> {
    (proptest::collection::vec(any_name(), 1..3), any_test())
}

fn any_namespace(from: usize) -> impl Strategy<Value = Namespace> {
    let label = proptest::sample::select(vec!["a", "b", "a b", "ä", "\u{fdd0}"]);
    proptest::collection::vec(label, from..4).prop_map(|labels| labels.into_iter().collect())
}

fn any_write() -> impl Strategy<Value = DocumentWrite> {
    let key = proptest::sample::select(vec!["a", "b", "c", "Z", "\u{fdd0}", "\u{fdd0}0"]);
    let at = (any_namespace(1), key).prop_map(|(namespace, key)| DocumentKey::new(namespace, key));
    (at, any_document(), 0..8).prop_map(|(at, value, kind)| {
        if kind == 0 {
            DocumentWrite::Delete { at }
        } else {
            DocumentWrite::Put {
                at,
                value,
                ttl: None,
            }
        }
    })
}

fn pick<T>(runner: &mut TestRunner, strategy: impl Strategy<Value = T>) -> T {
    strategy.new_tree(runner).expect("generates").current()
}

/// Plays random batches and searches. The seed is fixed: what fails here fails again.
async fn agrees_with_the_model(store: Arc<dyn DocumentStore>) {
    let mut runner = TestRunner::new_with_rng(
        Config::default(),
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    let mut model: BTreeMap<DocumentKey, Value> = BTreeMap::new();
    let mut hits = 0;
    for _ in 0..ROUNDS {
        let batch = pick(&mut runner, proptest::collection::vec(any_write(), 1..30));
        for write in &batch {
            match write {
                DocumentWrite::Put { at, value, .. } => model.insert(at.clone(), value.clone()),
                DocumentWrite::Delete { at } => model.remove(at),
            };
        }
        store.write(batch).await.expect("writes");
        for _ in 0..25 {
            let prefix = pick(&mut runner, any_namespace(0));
            let conditions = pick(
                &mut runner,
                proptest::collection::vec(any_condition(), 0..3),
            );
            let expected: Vec<(&DocumentKey, &Value)> = model
                .iter()
                .filter(|(at, value)| {
                    at.namespace.labels().starts_with(prefix.labels())
                        && conditions
                            .iter()
                            .all(|(path, test)| holds(value, path, test))
                })
                .collect();
            let filter = conditions
                .iter()
                .fold(Filter::new(), |filter, (path, test)| {
                    filter.and(path.clone(), test.clone())
                });
            let search = Search::below(&prefix)
                .filter(filter)
                .order(Order::Key)
                .page(0, 1000);
            let found = store.search(&search).await.expect("searches");
            let found: Vec<(DocumentKey, Value)> = found
                .into_iter()
                .map(|document| {
                    let at = DocumentKey::new(document.namespace, document.key);
                    (at, document.value)
                })
                .collect();
            let found: Vec<(&DocumentKey, &Value)> =
                found.iter().map(|(at, value)| (at, value)).collect();
            assert_eq!(found, expected, "{search:?}");
            hits += found.len();
        }
        let depth = pick(&mut runner, proptest::option::of(1_usize..4));
        let mut expected: Vec<Namespace> = model
            .keys()
            .map(|at| {
                let labels = at.namespace.labels();
                let cut = depth.unwrap_or(labels.len()).min(labels.len());
                labels[..cut].to_vec().into()
            })
            .collect();
        expected.dedup();
        let filter = NamespaceFilter {
            depth,
            limit: Some(1000),
            ..NamespaceFilter::default()
        };
        assert_eq!(store.namespaces(&filter).await.expect("lists"), expected);
    }
    assert!(hits > 1000, "something is found: {hits}");
}

fn of(db: &dyn Checkpointer) -> Arc<dyn DocumentStore> {
    db.documents().expect("has a store of documents")
}

#[tokio::test]
async fn memory_finds_what_the_model_finds() {
    agrees_with_the_model(of(&MemoryCheckpointer::new())).await;
}

#[tokio::test]
async fn sqlite_finds_what_the_model_finds() {
    let (path, _dir) = storage::sqlite_path();
    let db = storage::sqlite(path).await;
    db.migrate().await.expect("migrates");
    agrees_with_the_model(of(&db)).await;
}

#[tokio::test]
async fn postgres_finds_what_the_model_finds() {
    let schema = storage::Schema::make().await;
    let db = storage::connect(schema.url.clone()).await;
    db.migrate().await.expect("migrates");
    agrees_with_the_model(of(&db)).await;
}
