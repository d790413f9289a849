//! `docs/semantics.md` says which test shows which statement; a table like that is worth something as long as the tests exist.

use std::path::Path;

/// Where a module of tests may be.
const PLACES: [&str; 4] = [
    "tests/semantics",
    "tests/faults",
    "tests/model",
    "src/conformance",
];

/// What is named in a row, as module (or path) and test; `…` is the module that was named before.
fn named(row: &str) -> Vec<(String, String)> {
    let mut module = String::new();
    let words = row.split('`').skip(1).step_by(2);
    words
        .filter_map(|word| {
            let (before, test) = word.rsplit_once("::")?;
            if before != "…" {
                before.clone_into(&mut module);
            }
            let is_name = |text: &str| {
                !text.is_empty()
                    && text.chars().all(|c| {
                        c.is_ascii_lowercase() || c.is_ascii_digit() || "_*…/.".contains(c)
                    })
            };
            (is_name(&module) && is_name(test)).then(|| (module.clone(), test.to_owned()))
        })
        .collect()
}

#[test]
fn every_test_that_is_named_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("docs/semantics.md")).expect("is there");
    let rows = text.lines().filter(|line| line.starts_with('|'));
    let all: Vec<_> = rows.flat_map(named).collect();
    assert!(all.len() > 300, "the tables are read: {}", all.len());
    let missing: Vec<_> = all
        .into_iter()
        .filter(|(module, test)| {
            let files = PLACES.map(|place| root.join(place).join(format!("{module}.rs")));
            let files = files.into_iter().chain([root.join(module)]);
            let sources: String = files.flat_map(std::fs::read_to_string).collect();
            // Some names end in a star, or are cut: what comes before is enough.
            let (name, is_whole) = match test.find(['*', '…']) {
                Some(end) => (&test[..end], false),
                None => (test.as_str(), true),
            };
            let is_there = sources.match_indices(name).any(|(at, _)| {
                let after = sources[at + name.len()..].chars().next();
                let is_end = !after.is_some_and(|c| c.is_alphanumeric() || c == '_');
                !sources[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_')
                    && (is_end || !is_whole)
            });
            sources.is_empty() || !is_there
        })
        .collect();
    assert!(missing.is_empty(), "nobody has these: {missing:#?}");
}
