//! `docs/promises.md` says which test shows which promise; a table like that is worth something as long as the tests exist.

use std::path::Path;

/// Every `file.rs` and `file.rs::test` between backticks.
fn named(text: &str) -> Vec<(&str, Option<&str>)> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .filter_map(|word| match word.split_once("::") {
            Some((file, test)) if file.strip_suffix(".rs").is_some() => Some((file, Some(test))),
            None if word.contains('/')
                && !word.contains('*')
                && word.strip_suffix(".rs").is_some() =>
            {
                Some((word, None))
            }
            _ => None,
        })
        .collect()
}

#[test]
fn every_test_that_is_named_exists() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let text = std::fs::read_to_string(root.join("docs/promises.md")).unwrap();
    let named = named(&text);
    assert!(named.len() > 100, "the table is read: {}", named.len());
    let missing: Vec<_> = named
        .into_iter()
        .filter(|(file, test)| {
            let source = std::fs::read_to_string(root.join(file)).unwrap_or_default();
            source.is_empty() || test.is_some_and(|test| !source.contains(&format!("fn {test}(")))
        })
        .collect();
    assert!(missing.is_empty(), "nobody has these: {missing:#?}");
}
