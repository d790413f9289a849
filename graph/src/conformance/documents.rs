//! What every store of documents promises. Run by [`documents_conformance!`](crate::documents_conformance).

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};

use super::lab::Lab;
use crate::{
    checkpoint::StorageError,
    documents::{
        Document, DocumentKey, DocumentStore, DocumentWrite, Filter, MAX_BATCH, MAX_CHOICES,
        MAX_CONDITIONS, MAX_DOCUMENT_BYTES, MAX_KEY_BYTES, MAX_NAMESPACE_BYTES, Namespace,
        NamespaceFilter, Order, Scalar, Search, Test,
    },
};

fn store(lab: &Lab) -> Arc<dyn DocumentStore> {
    lab.db.documents().expect("has a store of documents")
}

fn put_of(namespace: impl Into<Namespace>, key: &str, value: Value) -> DocumentWrite {
    DocumentWrite::Put {
        at: DocumentKey::new(namespace, key),
        value,
        ttl: None,
    }
}

async fn put(store: &dyn DocumentStore, namespace: impl Into<Namespace>, key: &str, value: Value) {
    store
        .write(vec![put_of(namespace, key, value)])
        .await
        .expect("writes");
}

async fn put_for(store: &dyn DocumentStore, key: &str, ttl: Duration) {
    let put = DocumentWrite::Put {
        at: DocumentKey::new(["n"], key),
        value: json!(key),
        ttl: Some(ttl),
    };
    store.write(vec![put]).await.expect("writes");
}

async fn get(
    store: &dyn DocumentStore,
    namespace: impl Into<Namespace>,
    key: &str,
) -> Option<Document> {
    let mut found = store
        .get(&[DocumentKey::new(namespace, key)], false)
        .await
        .expect("reads");
    assert_eq!(found.len(), 1);
    found.remove(0)
}

async fn keys(store: &dyn DocumentStore, search: Search) -> Vec<String> {
    let found = store.search(&search).await.expect("searches");
    found.into_iter().map(|document| document.key).collect()
}

async fn names(store: &dyn DocumentStore, filter: NamespaceFilter) -> Vec<String> {
    let found = store.namespaces(&filter).await.expect("lists");
    found.iter().map(ToString::to_string).collect()
}

/// With its value as it was given; a second one takes its place and keeps the time of the first.
pub async fn a_document_comes_back_as_it_was_put(lab: &Lab) {
    let store = store(lab);
    let odd = json!({
        "text": "ä\u{0}\u{fdd0}\\\"\u{1F600}", "n": [1, -1, 1.5, 9_007_199_254_740_993_i64, u64::MAX],
        "deep": {"er": [null, true, {"": ""}]}, "a.b": 1,
    });
    for (key, value) in [
        ("object", odd),
        ("null", json!(null)),
        ("list", json!([1])),
        ("n", json!(1)),
    ] {
        put(&*store, ["users", "anna"], key, value.clone()).await;
        let document = get(&*store, ["users", "anna"], key)
            .await
            .expect("is there");
        assert_eq!((document.value, document.key.as_str()), (value, key));
        assert_eq!(document.namespace, ["users", "anna"].into());
        assert_eq!(document.created_at, document.updated_at);
        assert_eq!(document.expires_at, None);
    }
    let first = get(&*store, ["users", "anna"], "n")
        .await
        .expect("is there");
    put(&*store, ["users", "anna"], "n", json!(2)).await;
    let second = get(&*store, ["users", "anna"], "n")
        .await
        .expect("is there");
    assert_eq!(
        (second.value, second.created_at),
        (json!(2), first.created_at)
    );
    assert!(second.updated_at >= first.updated_at);
    // Elsewhere is elsewhere.
    assert_eq!(get(&*store, ["users"], "n").await, None);
    assert_eq!(get(&*store, ["users", "anna"], "N").await, None);
    assert_eq!(get(&*store, ["users", "anna", "n"], "n").await, None);
    assert_eq!(get(&*store, ["usersanna"], "n").await, None);
    // And another handle sees the same.
    let other = lab.open().await.documents().expect("has a store");
    assert!(get(&*other, ["users", "anna"], "n").await.is_some());
}

/// What is taken away is gone, and only that.
pub async fn a_deleted_document_is_gone(lab: &Lab) {
    let store = store(lab);
    for key in ["a", "b"] {
        put(&*store, ["n"], key, json!(1)).await;
    }
    for _ in 0..2 {
        let delete = DocumentWrite::Delete {
            at: DocumentKey::new(["n"], "a"),
        };
        store.write(vec![delete]).await.expect("deletes");
        assert_eq!(get(&*store, ["n"], "a").await, None);
        assert_eq!(keys(&*store, Search::below(["n"])).await, ["b"]);
    }
}

/// All or nothing, in order; reading keeps the order of the names.
pub async fn batches_are_written_as_one_and_read_in_order(lab: &Lab) {
    let store = store(lab);
    let at = |key: &str| DocumentKey::new(["n"], key);
    let batch = vec![
        put_of(["n"], "a", json!(1)),
        put_of(["n"], "b", json!(1)),
        DocumentWrite::Delete { at: at("b") },
        put_of(["n"], "a", json!(2)),
        DocumentWrite::Delete { at: at("c") },
        put_of(["n"], "c", json!(3)),
    ];
    store.write(batch).await.expect("writes");
    let wanted = [at("c"), at("b"), at("a"), at("c")];
    let found = store.get(&wanted, false).await.expect("reads");
    let values: Vec<Option<Value>> = found.into_iter().map(|d| d.map(|d| d.value)).collect();
    assert_eq!(
        values,
        [Some(json!(3)), None, Some(json!(2)), Some(json!(3))]
    );
    let spoiled = vec![
        put_of(["n"], "a", json!("new")),
        put_of(["n"], "", json!(1)),
    ];
    assert!(matches!(
        store.write(spoiled).await,
        Err(StorageError::Unstorable { .. })
    ));
    assert_eq!(
        get(&*store, ["n"], "a").await.expect("stays").value,
        json!(2)
    );
    assert_eq!(store.get(&[], true).await.expect("reads"), []);
    store.write(Vec::new()).await.expect("writes nothing");
    // Many at the same time, in all orders.
    let writers = (0..8_usize).map(|n| {
        let store = store.clone();
        async move {
            for round in 0..5 {
                let mut batch: Vec<_> = (0..10)
                    .map(|key| put_of(["m"], &format!("k{key}"), json!([n, round])))
                    .collect();
                batch.rotate_left(n);
                store.write(batch).await.expect("writes");
            }
        }
    });
    futures::future::join_all(writers).await;
    let all = store.search(&Search::below(["m"])).await.expect("finds");
    assert_eq!(all.len(), 10);
    assert!(
        all.iter().all(|document| document.value == all[0].value),
        "{all:?}"
    );
}

/// With errors that say what is wrong; nothing is written.
pub async fn what_cannot_be_a_document_is_refused(lab: &Lab) {
    let store = store(lab);
    let long = "x".repeat(MAX_KEY_BYTES + 1);
    let wide: Namespace = vec!["x".repeat(MAX_NAMESPACE_BYTES)].into();
    let mut deep = json!(1);
    for _ in 0..200 {
        deep = json!([deep]);
    }
    for (namespace, key, value) in [
        (Namespace::all(), "k", json!(1)),
        (["a", ""].into(), "k", json!(1)),
        (["a\u{1f}"].into(), "k", json!(1)),
        (["a"].into(), "", json!(1)),
        (["a"].into(), "k\n", json!(1)),
        (["a"].into(), "k", deep),
    ] {
        let error = store.write(vec![put_of(&namespace, key, value)]).await;
        assert!(
            matches!(error, Err(StorageError::Unstorable { .. })),
            "{namespace:?} {key:?}"
        );
    }
    let large = json!("x".repeat(MAX_DOCUMENT_BYTES));
    for (namespace, key, value, most) in [
        (["a"].into(), long.as_str(), json!(1), MAX_KEY_BYTES),
        (wide, "k", json!(1), MAX_NAMESPACE_BYTES),
        (["a"].into(), "k", large, MAX_DOCUMENT_BYTES),
    ] {
        let error = store.write(vec![put_of(namespace, key, value)]).await;
        assert!(
            matches!(error, Err(StorageError::TooLarge { most: allowed, .. }) if allowed == most),
            "{key} {most}"
        );
    }
    let largest = json!("x".repeat(MAX_DOCUMENT_BYTES - 2));
    put(&*store, ["largest"], "k", largest.clone()).await;
    assert_eq!(
        get(&*store, ["largest"], "k")
            .await
            .expect("is there")
            .value,
        largest
    );
    let many = vec![put_of(["a"], "k", json!(1)); MAX_BATCH + 1];
    assert!(matches!(
        store.write(many).await,
        Err(StorageError::Unstorable { .. })
    ));
    let filters = [
        Filter::new().eq("", 1),
        Filter::new().eq("a..b", 1),
        Filter::new().eq(["a\"b"], 1),
        Filter::new().eq(["a\\b"], 1),
        Filter::new().one_of("a", 0..=MAX_CHOICES),
        (0..=MAX_CONDITIONS).fold(Filter::new(), |filter, _| filter.eq("a", 1)),
    ];
    for filter in filters {
        let error = store.search(&Search::below(["a"]).filter(filter)).await;
        assert!(matches!(error, Err(StorageError::InvalidFilter { .. })));
    }
    let most = (0..MAX_CONDITIONS).fold(Filter::new(), |filter, _| {
        filter.one_of("a", 0..MAX_CHOICES)
    });
    assert_eq!(
        keys(&*store, Search::below(["a"]).filter(most)).await,
        [""; 0]
    );
    assert_eq!(keys(&*store, Search::below(["a"])).await, [""; 0]);
}

/// By whole labels, whatever characters are in them.
pub async fn a_prefix_means_whole_labels(lab: &Lab) {
    let store = store(lab);
    for (n, namespace) in [
        vec!["a"],
        vec!["a", "b"],
        vec!["a", "b", "c"],
        vec!["a b"],
        vec!["a!"],
        vec!["ab"],
        vec!["a%"],
        vec!["a_"],
        vec!["ä", "\u{10ffff}"],
        vec!["ä", "\u{10ffff}\u{10ffff}"],
        vec!["\u{fdd0}", "x"],
    ]
    .into_iter()
    .enumerate()
    {
        let namespace: Namespace = namespace.into_iter().collect();
        put(&*store, namespace, &format!("{n:02}"), json!(n)).await;
    }
    let below = async |prefix: Vec<&str>| {
        let prefix: Namespace = prefix.into_iter().collect();
        let mut found = keys(&*store, Search::below(prefix).order(Order::Key)).await;
        found.sort();
        found.join(" ")
    };
    assert_eq!(below(vec!["a"]).await, "00 01 02");
    assert_eq!(below(vec!["a", "b"]).await, "01 02");
    assert_eq!(below(vec!["a", "b", "c", "d"]).await, "");
    assert_eq!(below(vec!["a%"]).await, "06");
    assert_eq!(below(vec!["a_"]).await, "07");
    assert_eq!(below(vec!["ä"]).await, "08 09");
    assert_eq!(below(vec!["ä", "\u{10ffff}"]).await, "08");
    assert_eq!(below(vec!["\u{fdd0}"]).await, "10");
    assert_eq!(below(vec![]).await, "00 01 02 03 04 05 06 07 08 09 10");
    let in_order = keys(&*store, Search::below(Namespace::all()).order(Order::Key)).await;
    assert_eq!(in_order.join(" "), "00 01 02 03 04 06 07 05 08 09 10");
}

/// Numbers as numbers, text by code point, false before true; never across types.
pub async fn comparisons_are_typed(lab: &Lab) {
    let store = store(lab);
    let values = [
        ("0.1", json!(0.1)),
        ("1", json!(1)),
        ("1.0", json!(1.0)),
        ("9", json!(9)),
        ("10", json!(10)),
        ("10.5", json!(10.5)),
        ("-1", json!(-1)),
        ("2^53", json!(9_007_199_254_740_992_i64)),
        ("2^53.0", json!(9_007_199_254_740_992.0)),
        ("2^53+1", json!(9_007_199_254_740_993_i64)),
        ("imax", json!(i64::MAX)),
        ("umax-1", json!(u64::MAX - 1)),
        ("umax", json!(u64::MAX)),
        ("1e300", json!(1e300)),
        ("t9", json!("9")),
        ("t10", json!("10")),
        ("tä", json!("ä")),
        ("tnul", json!("9\u{0}")),
        ("true", json!(true)),
        ("false", json!(false)),
        ("null", json!(null)),
        ("list", json!([1])),
        ("object", json!({"v": 1})),
    ];
    for (key, value) in values {
        put(&*store, ["n"], key, json!({"v": value, "in": {"v": value}})).await;
    }
    put(&*store, ["n"], "nothing", json!({})).await;
    put(&*store, ["n"], "number", json!(1)).await;
    let find = async |test: Test| {
        let mut both = Vec::new();
        for path in ["v", "in.v"] {
            let filter = Filter::new().and(path, test.clone());
            let search = Search::below(["n"]).filter(filter).order(Order::Key);
            both.push(keys(&*store, search).await.join(" "));
        }
        assert_eq!(both[0], both[1], "{test:?}");
        both.remove(0)
    };
    let n = |n: i64| Scalar::from(n);
    assert_eq!(find(Test::Eq(n(1))).await, "1 1.0");
    assert_eq!(find(Test::Eq(1.0.into())).await, "1 1.0");
    assert_eq!(find(Test::Eq(0.1.into())).await, "0.1");
    assert_eq!(find(Test::Lt(n(10))).await, "-1 0.1 1 1.0 9");
    assert_eq!(find(Test::Lte(n(10))).await, "-1 0.1 1 1.0 10 9");
    assert_eq!(
        find(Test::Gt(n(9))).await,
        "10 10.5 1e300 2^53 2^53+1 2^53.0 imax umax umax-1"
    );
    assert_eq!(
        find(Test::Gte(9_007_199_254_740_993_i64.into())).await,
        "1e300 2^53+1 imax umax umax-1"
    );
    assert_eq!(
        find(Test::Gt(9_007_199_254_740_992.0.into())).await,
        "1e300 2^53+1 imax umax umax-1"
    );
    assert_eq!(find(Test::Eq(u64::MAX.into())).await, "umax");
    assert_eq!(find(Test::Gt(i64::MAX.into())).await, "1e300 umax umax-1");
    assert_eq!(find(Test::Lt(1e300.into())).await.split(' ').count(), 13);
    assert_eq!(
        find(Test::Ne(n(1))).await,
        "-1 0.1 10 10.5 1e300 2^53 2^53+1 2^53.0 9 imax umax umax-1"
    );
    assert_eq!(find(Test::Eq("9".into())).await, "t9");
    assert_eq!(find(Test::Lt("9".into())).await, "t10");
    assert_eq!(find(Test::Gt("9".into())).await, "tnul tä");
    assert_eq!(find(Test::Lte("9\u{0}".into())).await, "t10 t9 tnul");
    assert_eq!(find(Test::Gte("9\u{0}".into())).await, "tnul tä");
    assert_eq!(find(Test::Lt("9\u{1}".into())).await, "t10 t9 tnul");
    assert_eq!(find(Test::Ne("ä".into())).await, "t10 t9 tnul");
    assert_eq!(find(Test::Eq(true.into())).await, "true");
    assert_eq!(find(Test::Lt(true.into())).await, "false");
    assert_eq!(find(Test::Gte(false.into())).await, "false true");
    assert_eq!(find(Test::Ne(true.into())).await, "false");
    assert_eq!(find(Test::Eq(Scalar::Null)).await, "null");
    assert_eq!(find(Test::Gte(Scalar::Null)).await, "null");
    assert_eq!(find(Test::Gt(Scalar::Null)).await, "");
    assert_eq!(find(Test::Ne(Scalar::Null)).await, "");
    let choices = vec![n(9), "9".into(), true.into(), Scalar::Null, "none".into()];
    assert_eq!(find(Test::In(choices)).await, "9 null t9 true");
    assert_eq!(find(Test::In(Vec::new())).await, "");
    assert_eq!(find(Test::Exists(false)).await, "nothing number");
    assert_eq!(find(Test::Exists(true)).await.split(' ').count(), 23);
}

/// Fields of objects, with any name that a path can have; items of lists are none.
pub async fn paths_lead_through_objects(lab: &Lab) {
    let store = store(lab);
    let value = json!({"a": {"b": {"c": 1}}, "a.b": 2, "0": 3, "l": [4, {"x": 5}], "ä b": 6, "$": 7, "[0]": 8, "#": 9});
    put(&*store, ["n"], "k", value).await;
    let hits = async |filter: Filter| {
        !keys(&*store, Search::below(["n"]).filter(filter))
            .await
            .is_empty()
    };
    assert!(hits(Filter::new().eq("a.b.c", 1)).await);
    assert!(hits(Filter::new().eq(["a.b"], 2)).await);
    assert!(!hits(Filter::new().eq(["a", "b"], 2)).await);
    assert!(hits(Filter::new().eq("0", 3)).await);
    assert!(!hits(Filter::new().exists("l.0", true)).await);
    assert!(!hits(Filter::new().exists("l.x", true)).await);
    assert!(!hits(Filter::new().exists("l.1.x", true)).await);
    assert!(hits(Filter::new().eq("ä b", 6)).await);
    assert!(hits(Filter::new().eq("$", 7)).await);
    assert!(hits(Filter::new().eq("[0]", 8)).await);
    assert!(hits(Filter::new().eq("#", 9)).await);
    assert!(hits(Filter::new().exists("a.b", true).exists("a.x", false)).await);
    assert!(!hits(Filter::new().eq("a.b.c", 1).eq("0", 4)).await);
}

/// By time or by name, a page at a time.
pub async fn what_is_found_comes_in_order_and_in_pages(lab: &Lab) {
    let store = store(lab);
    for key in ["c", "a", "b", "e", "d"] {
        put(&*store, ["n"], key, json!({"key": key})).await;
        // The clocks of databases count microseconds.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    put(&*store, ["n"], "a", json!({"key": "a"})).await;
    let all = || Search::below(["n"]);
    assert_eq!(keys(&*store, all()).await.concat(), "adebc");
    assert_eq!(
        keys(&*store, all().order(Order::OldestFirst))
            .await
            .concat(),
        "cbeda"
    );
    assert_eq!(
        keys(&*store, all().order(Order::Key)).await.concat(),
        "abcde"
    );
    assert_eq!(keys(&*store, all().page(0, 2)).await.concat(), "ad");
    assert_eq!(keys(&*store, all().page(2, 2)).await.concat(), "eb");
    assert_eq!(keys(&*store, all().page(4, 2)).await.concat(), "c");
    assert_eq!(keys(&*store, all().page(5, 2)).await.concat(), "");
    assert_eq!(keys(&*store, all().page(0, 0)).await.concat(), "");
    let filter = Filter::new().gt("key", "b");
    let page = all().filter(filter).order(Order::Key).page(1, 5);
    assert_eq!(keys(&*store, page).await.concat(), "de");
}

/// Each once, cut to a depth when asked.
pub async fn namespaces_are_listed_by_prefix_and_depth(lab: &Lab) {
    let store = store(lab);
    for namespace in ["a", "a/b", "a/b/c", "a/b/d", "a/c/x/y", "ab", "b/c"] {
        let namespace: Namespace = namespace.split('/').collect();
        for key in ["1", "2"] {
            put(&*store, &namespace, key, json!(1)).await;
        }
    }
    let all = NamespaceFilter::default();
    let below = |prefix: &[&str], depth| NamespaceFilter {
        prefix: prefix.iter().copied().collect(),
        depth,
        ..NamespaceFilter::default()
    };
    assert_eq!(
        names(&*store, all.clone()).await,
        ["a", "a/b", "a/b/c", "a/b/d", "a/c/x/y", "ab", "b/c"]
    );
    assert_eq!(names(&*store, below(&[], Some(1))).await, ["a", "ab", "b"]);
    assert_eq!(
        names(&*store, below(&[], Some(2))).await,
        ["a", "a/b", "a/c", "ab", "b/c"]
    );
    assert_eq!(
        names(&*store, below(&["a"], Some(2))).await,
        ["a", "a/b", "a/c"]
    );
    assert_eq!(
        names(&*store, below(&["a", "b"], None)).await,
        ["a/b", "a/b/c", "a/b/d"]
    );
    assert_eq!(names(&*store, below(&["a", "c"], Some(3))).await, ["a/c/x"]);
    assert_eq!(names(&*store, below(&["x"], None)).await, [""; 0]);
    let page = NamespaceFilter {
        depth: Some(2),
        limit: Some(2),
        offset: 1,
        ..all
    };
    assert_eq!(names(&*store, page).await, ["a/b", "a/c"]);
}

/// It is not found, not listed, not refreshed; one that is put in its place is new.
pub async fn what_has_expired_is_not_there(lab: &Lab) {
    let store = store(lab);
    put_for(&*store, "short", Duration::from_hours(1)).await;
    put_for(&*store, "long", Duration::from_hours(1)).await;
    put_for(&*store, "for ever", Duration::MAX).await;
    let short = get(&*store, ["n"], "short").await.expect("is there");
    assert!(short.expires_at.expect("ends") > short.created_at);
    assert_eq!(keys(&*store, Search::below(["n"])).await.len(), 3);
    // However slow the machine is, it is there until now, and not for long.
    put_for(&*store, "short", Duration::from_millis(50)).await;
    for _ in 0..1000 {
        if get(&*store, ["n"], "short").await.is_none() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(get(&*store, ["n"], "short").await, None);
    let refreshed = store.get(&[DocumentKey::new(["n"], "short")], true).await;
    assert_eq!(refreshed.expect("reads"), [None]);
    let search = Search::below(["n"]).order(Order::Key).refresh();
    assert_eq!(keys(&*store, search).await, ["for ever", "long"]);
    put_for(&*store, "short", Duration::from_hours(1)).await;
    let again = get(&*store, ["n"], "short").await.expect("is there");
    assert!(again.created_at > short.created_at);
    // Put without a time to live, it stays.
    put(&*store, ["n"], "long", json!(1)).await;
    assert_eq!(
        get(&*store, ["n"], "long")
            .await
            .expect("is there")
            .expires_at,
        None
    );
    put_for(&*store, "gone", Duration::ZERO).await;
    assert_eq!(get(&*store, ["n"], "gone").await, None);
    let namespaces = names(&*store, NamespaceFilter::default()).await;
    assert_eq!(namespaces, ["n"]);
    assert_eq!(store.sweep(10).await.expect("sweeps"), 1);
    assert_eq!(store.sweep(10).await.expect("sweeps"), 0);
    assert_eq!(keys(&*store, Search::below(["n"])).await.len(), 3);
    // A namespace of which everything has expired is not listed.
    let write = DocumentWrite::Put {
        at: DocumentKey::new(["m"], "k"),
        value: json!(1),
        ttl: Some(Duration::ZERO),
    };
    store.write(vec![write]).await.expect("writes");
    assert_eq!(names(&*store, NamespaceFilter::default()).await, ["n"]);
}

/// From the time of the reading on, by its own time to live.
pub async fn reading_refreshes_when_asked(lab: &Lab) {
    let store = store(lab);
    let hour = Duration::from_hours(1);
    for key in ["a", "b", "c"] {
        put_for(&*store, key, hour).await;
    }
    put(&*store, ["n"], "stays", json!(1)).await;
    let ends = async |key: &str| get(&*store, ["n"], key).await.expect("is there").expires_at;
    let (a, b, c) = (ends("a").await, ends("b").await, ends("c").await);
    tokio::time::sleep(Duration::from_millis(5)).await;
    let names = [
        DocumentKey::new(["n"], "a"),
        DocumentKey::new(["n"], "stays"),
    ];
    let read = store.get(&names, true).await.expect("reads");
    let read = read[0].as_ref().expect("is there");
    assert!(read.expires_at > a);
    assert_eq!(read.updated_at, read.created_at, "reading is not writing");
    assert_eq!(ends("a").await, read.expires_at);
    let search = Search::below(["n"]).order(Order::Key).page(1, 1).refresh();
    let found = store.search(&search).await.expect("searches");
    assert_eq!(found[0].key, "b");
    assert!(found[0].expires_at > b);
    assert_eq!(ends("b").await, found[0].expires_at);
    assert_eq!(ends("c").await, c, "what was not found is not refreshed");
    assert_eq!(ends("stays").await, None);
}

/// Nothing that happens to threads happens to them.
pub async fn documents_live_beside_threads(lab: &Lab) {
    let store = store(lab);
    put(&*store, ["t"], "k", json!(1)).await;
    lab.create("t").await;
    lab.db.delete_thread(&"t".into()).await.expect("deletes");
    assert!(get(&*store, ["t"], "k").await.is_some());
}
