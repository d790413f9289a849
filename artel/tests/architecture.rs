//! What `docs/ARCHITECTURE.md` says of who may know whom is what the manifests say.

use std::collections::BTreeSet;
use std::path::Path;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The crates of ours that a crate needs when it is used, as its manifest lists them.
fn known_by(folder: &str, ours: &BTreeSet<String>) -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
    let manifest: toml::Table = text.parse().unwrap();
    manifest
        .get("dependencies")
        .and_then(toml::Value::as_table)
        .into_iter()
        .flat_map(|dependencies| dependencies.keys())
        .filter(|name| ours.contains(*name))
        .cloned()
        .collect()
}

#[test]
fn the_map_says_who_may_know_whom() {
    let workspace: toml::Table = std::fs::read_to_string(root().join("Cargo.toml"))
        .unwrap()
        .parse()
        .unwrap();
    let ours: BTreeSet<String> = workspace["workspace"]["dependencies"]
        .as_table()
        .unwrap()
        .iter()
        .filter(|(_, value)| value.get("path").is_some())
        .map(|(name, _)| name.clone())
        .collect();
    let map = std::fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    let mut rows = 0;
    for line in map.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, folder, _, allowed, _] = cells.as_slice() else {
            continue;
        };
        let folder = folder.trim_matches('`').trim_end_matches('/');
        if folder.is_empty()
            || *allowed == "everybody"
            || !root().join(folder).join("Cargo.toml").is_file()
        {
            continue;
        }
        let allowed: BTreeSet<String> = allowed
            .split(',')
            .map(|name| name.trim().trim_matches('`').to_owned())
            .filter(|name| ours.contains(name))
            .collect();
        let mut known = known_by(folder, &ours);
        // The engine's own derive is a part of it.
        known.remove("graph-derive");
        assert_eq!(
            known, allowed,
            "{folder}: the manifest and docs/ARCHITECTURE.md differ"
        );
        rows += 1;
    }
    assert_eq!(rows, 14, "every crate but the program stands in the map");
}

#[test]
fn only_one_place_of_the_program_prints() {
    let mut folders = vec![root().join("artel/src")];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(path);
            }
        }
    }
    assert!(files.len() > 30, "the sources are read: {files:?}");
    let prints = |path: &Path| {
        let text = std::fs::read_to_string(path).unwrap();
        ["println!(", "std::io::stdout().write", "dbg!("]
            .iter()
            .any(|way| text.contains(way))
    };
    let printing: Vec<_> = files.iter().filter(|path| prints(path)).collect();
    // A prompt after which nothing else is said ends its line itself.
    let allowed = ["artel/src/words.rs", "artel/src/commands/terminal.rs"];
    let others: Vec<_> = printing
        .iter()
        .filter(|path| !allowed.iter().any(|name| path.ends_with(name)))
        .collect();
    assert!(others.is_empty(), "use crate::words there: {others:#?}");
}
