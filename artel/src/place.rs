//! Where things stand in a TOML file, so that what is wrong with it can be found. It looks at the file again, which is only
//! done when something is wrong or has to be explained.

use std::path::Path;

use toml::de::{DeTable, DeValue};

/// `FILE, line 3`: where a key stands; the file alone when the key is not in it.
pub fn place(file: &Path, keys: &[&str]) -> String {
    let line = std::fs::read_to_string(file)
        .ok()
        .and_then(|text| line_of(&text, keys));
    match line {
        Some(line) => format!("{}, line {line}", file.display()),
        None => file.display().to_string(),
    }
}

/// The line, from 1, of a key that is reached through tables.
pub fn line_of(text: &str, keys: &[&str]) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let mut table = Some(document.get_ref());
    let mut at = None;
    for key in keys {
        let (name, value) = table?
            .iter()
            .find(|(name, _)| name.get_ref().as_ref() == *key)?;
        at = Some(name.span().start);
        table = match value.get_ref() {
            DeValue::Table(inner) => Some(inner),
            _ => None,
        };
    }
    at.map(|at| line_at(text, at))
}

/// The line, from 1, of a place in a text.
pub fn line_at(text: &str, at: usize) -> usize {
    text.as_bytes()
        .iter()
        .take(at)
        .filter(|byte| **byte == b'\n')
        .count()
        + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_in_its_line() {
        let text =
            "a = 1\n\n[policy]\nmax = 3\nagent = { adapter = 'x' }\n[policy.limits]\nwall_s = 3\n";
        assert_eq!(line_of(text, &["a"]), Some(1));
        assert_eq!(line_of(text, &["policy", "max"]), Some(4));
        assert_eq!(line_of(text, &["policy", "agent", "adapter"]), Some(5));
        assert_eq!(line_of(text, &["policy", "limits", "wall_s"]), Some(7));
        assert_eq!(line_of(text, &["policy", "other"]), None);
        assert_eq!(line_of(text, &["a", "b"]), None);
        assert_eq!(line_of("a = ", &["a"]), None);
    }
}
