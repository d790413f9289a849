//! What every [`Cache`] promises. [`cache_conformance!`](crate::cache_conformance) makes a test of each case.

use std::{any::Any, fmt, future::Future, sync::Arc, time::Duration};

use futures::future::{BoxFuture, join_all};
use serde_json::{Value, json};

use crate::cache::{Cache, CacheEntry, CacheLimits, CacheSpace};

type Open = Box<dyn Fn() -> BoxFuture<'static, Arc<dyn Cache>> + Send + Sync>;

/// A fresh cache, which can be opened several times, as by several processes.
pub struct CacheLab {
    open: Open,
    /// The first handle.
    pub cache: Arc<dyn Cache>,
    _keep: Box<dyn Any + Send + Sync>,
}

impl fmt::Debug for CacheLab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheLab").finish_non_exhaustive()
    }
}

impl CacheLab {
    /// A lab whose cache `open` opens. `keep` lives as long as the lab.
    pub async fn new<F, K>(open: impl Fn() -> F + Send + Sync + 'static, keep: K) -> Self
    where
        F: Future<Output = Arc<dyn Cache>> + Send + 'static,
        K: Any + Send + Sync,
    {
        let open: Open = Box::new(move || Box::pin(open()));
        Self {
            cache: open().await,
            open,
            _keep: Box::new(keep),
        }
    }

    async fn put(&self, space: &CacheSpace, key: &str, value: Value, ttl: Option<Duration>) {
        let entries = vec![entry(key, value, ttl)];
        self.cache
            .put(space, entries, CacheLimits::default())
            .await
            .expect("puts");
    }

    async fn get(&self, space: &CacheSpace, key: &str) -> Option<Value> {
        let mut found = self
            .cache
            .get(space, &[key.to_owned()])
            .await
            .expect("gets");
        assert_eq!(found.len(), 1);
        found.remove(0)
    }
}

fn entry(key: &str, value: Value, ttl: Option<Duration>) -> CacheEntry {
    CacheEntry {
        key: key.to_owned(),
        value,
        ttl,
    }
}

fn space() -> CacheSpace {
    CacheSpace::new("graph", "node")
}

/// What was put comes back, in the order of the keys asked for; what was not is missing.
pub async fn what_was_put_comes_back(lab: &CacheLab) {
    let values = [
        json!(null),
        json!({"text": "a\u{0}b \u{fffd} \"quoted\"", "n": [1, -2.5, u64::MAX, i64::MIN]}),
        json!("x".repeat(100_000)),
    ];
    let entries = values
        .iter()
        .enumerate()
        .map(|(index, value)| entry(&format!("k{index}"), value.clone(), None))
        .collect();
    lab.cache
        .put(&space(), entries, CacheLimits::default())
        .await
        .expect("puts");
    let keys = ["k2", "missing", "k0", "k1", "k2"].map(str::to_owned);
    let found = lab.cache.get(&space(), &keys).await.expect("gets");
    let expected = [
        Some(&values[2]),
        None,
        Some(&values[0]),
        Some(&values[1]),
        Some(&values[2]),
    ];
    assert_eq!(
        found.iter().map(Option::as_ref).collect::<Vec<_>>(),
        expected
    );
    assert_eq!(lab.cache.get(&space(), &[]).await.expect("gets"), []);
    lab.cache
        .put(&space(), Vec::new(), CacheLimits::default())
        .await
        .expect("nothing is little to put");
}

/// The last value of a key counts, in one put and over several; so does its time to live.
pub async fn a_key_holds_what_was_put_last(lab: &CacheLab) {
    lab.put(&space(), "k", json!(1), Some(Duration::ZERO)).await;
    assert_eq!(lab.get(&space(), "k").await, None);
    let entries = vec![
        entry("k", json!(2), Some(Duration::ZERO)),
        entry("k", json!(3), None),
    ];
    lab.cache
        .put(&space(), entries, CacheLimits::default())
        .await
        .expect("puts");
    assert_eq!(lab.get(&space(), "k").await, Some(json!(3)));
}

/// Nodes and graphs do not see each other's entries, whatever their names; clearing one leaves the others.
pub async fn spaces_are_apart(lab: &CacheLab) {
    let spaces = [("a", "bc"), ("ab", "c"), ("a:b", "c"), ("a", "b:c")]
        .map(|(graph, node)| CacheSpace::new(graph, node));
    for (index, space) in spaces.iter().enumerate() {
        lab.put(space, "k", json!(index), None).await;
        lab.put(space, "l", json!(index), None).await;
    }
    assert_eq!(lab.cache.clear(&spaces[1]).await.expect("clears"), 2);
    assert_eq!(lab.cache.clear(&spaces[1]).await.expect("clears"), 0);
    for (index, space) in spaces.iter().enumerate() {
        let expected = (index != 1).then(|| json!(index));
        assert_eq!(lab.get(space, "k").await, expected);
    }
}

/// What has a time to live is there until then; without one it stays. A very long one is no trouble.
pub async fn entries_expire(lab: &CacheLab) {
    lab.put(&space(), "short", json!(1), Some(Duration::from_millis(20)))
        .await;
    lab.put(&space(), "long", json!(2), Some(Duration::from_hours(1)))
        .await;
    lab.put(&space(), "longest", json!(3), Some(Duration::MAX))
        .await;
    let mut tries = 0;
    while lab.get(&space(), "short").await.is_some() {
        tries += 1;
        assert!(tries < 1000, "it never expires");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(lab.get(&space(), "long").await, Some(json!(2)));
    assert_eq!(lab.get(&space(), "longest").await, Some(json!(3)));
}

/// Expired entries do not pile up: putting others removes them, of other spaces too.
pub async fn expired_entries_are_removed(lab: &CacheLab) {
    let other = CacheSpace::new("graph", "other");
    let dead = (0..50)
        .map(|index| entry(&index.to_string(), json!(index), Some(Duration::ZERO)))
        .collect();
    lab.cache
        .put(&other, dead, CacheLimits::default())
        .await
        .expect("puts");
    for index in 0..200 {
        lab.put(&space(), &index.to_string(), json!(index), None)
            .await;
    }
    assert_eq!(lab.cache.clear(&other).await.expect("clears"), 0);
    assert_eq!(lab.cache.clear(&space()).await.expect("clears"), 200);
}

/// A space holds so many entries and bytes; what was put first goes first, and what is put again is young again.
pub async fn a_space_is_bounded(lab: &CacheLab) {
    let other = CacheSpace::new("graph", "other");
    lab.put(&other, "k", json!(1), None).await;
    let few = CacheLimits {
        entries: 40,
        ..CacheLimits::default()
    };
    let put = async |key: String, value: Value, limits: CacheLimits| {
        lab.cache
            .put(&space(), vec![entry(&key, value, None)], limits)
            .await
            .expect("puts");
    };
    put("again".to_owned(), json!(0), few).await;
    for index in 0..100 {
        put(index.to_string(), json!(index), few).await;
        if index % 20 == 0 {
            put("again".to_owned(), json!(index), few).await;
        }
    }
    assert_eq!(lab.get(&space(), "again").await, Some(json!(80)));
    assert_eq!(lab.get(&space(), "99").await, Some(json!(99)));
    assert_eq!(lab.get(&space(), "0").await, None);
    let held = lab.cache.clear(&space()).await.expect("clears");
    assert!((40..=45).contains(&held), "{held}");

    let small = CacheLimits {
        bytes: 8000,
        ..CacheLimits::default()
    };
    for index in 0..30 {
        put(index.to_string(), json!("x".repeat(998)), small).await;
    }
    assert!(lab.get(&space(), "29").await.is_some());
    let held = lab.cache.clear(&space()).await.expect("clears");
    assert!((8..=9).contains(&held), "{held}");
    assert_eq!(lab.get(&other, "k").await, Some(json!(1)));
}

/// What one handle puts, another one gets, and clears.
pub async fn handles_share_a_cache(lab: &CacheLab) {
    let other = (lab.open)().await;
    lab.put(&space(), "k", json!(1), None).await;
    let found = other.get(&space(), &["k".to_owned()]).await.expect("gets");
    assert_eq!(found, [Some(json!(1))]);
    assert_eq!(other.clear(&space()).await.expect("clears"), 1);
    assert_eq!(lab.get(&space(), "k").await, None);
}

/// Many that put the same keys in different orders all get through.
pub async fn writers_of_the_same_keys_get_through(lab: &CacheLab) {
    let limits = CacheLimits {
        entries: 8,
        ..CacheLimits::default()
    };
    let keys: Vec<String> = (0..20).map(|index| index.to_string()).collect();
    let writers = (0..6_usize).map(|writer| {
        let keys = keys.clone();
        let open = (lab.open)();
        async move {
            let cache = open.await;
            for round in 0..5 {
                let mut entries: Vec<CacheEntry> = keys
                    .iter()
                    .map(|key| entry(key, json!([writer, round]), None))
                    .collect();
                entries.rotate_left(writer * 3 + round);
                cache.put(&space(), entries, limits).await.expect("puts");
                cache.get(&space(), &keys).await.expect("gets");
            }
        }
    });
    join_all(writers).await;
    let left = lab.cache.clear(&space()).await.expect("clears");
    assert!((1..=20).contains(&left), "{left}");
}

/// Makes a `#[tokio::test]` of every case of [`graph::conformance::cache`](crate::conformance::cache).
///
/// The argument is an expression of a future that gives a [`CacheLab`]; it is evaluated once in each test.
#[macro_export]
macro_rules! cache_conformance {
    ($lab:expr) => {
        $crate::cache_conformance!(@cases $lab;
            what_was_put_comes_back,
            a_key_holds_what_was_put_last,
            spaces_are_apart,
            entries_expire,
            expired_entries_are_removed,
            a_space_is_bounded,
            handles_share_a_cache,
            writers_of_the_same_keys_get_through,
        );
    };
    (@cases $lab:expr; $($case:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                let lab: $crate::conformance::cache::CacheLab = $lab.await;
                $crate::conformance::cache::$case(&lab).await;
            }
        )*
    };
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_case_is_in_the_list() {
        let source = include_str!("cache.rs");
        for line in source.lines() {
            if let Some(rest) = line.strip_prefix("pub async fn ") {
                let name = rest.split('(').next().expect("a name");
                assert!(
                    source.contains(&format!("            {name},")),
                    "{name} is not run by cache_conformance!"
                );
            }
        }
    }
}
