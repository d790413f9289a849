//! Which names may become part of a path, of a ref or of a commit's trailer.

use ports::{ProjectId, Sha};

use crate::Error;

fn refuse<T>(what: &'static str, name: &str, reason: &'static str) -> Result<T, Error> {
    Err(Error::Name {
        what,
        name: name.chars().take(100).collect(),
        reason,
    })
}

/// A project's id, as it stands in the names of folders.
pub(crate) fn project(id: &ProjectId) -> Result<(), Error> {
    let name = id.as_str();
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty() || name.len() > 64 || name.starts_with('-') || !name.bytes().all(plain) {
        return refuse(
            "the project",
            name,
            "an id has 1 to 64 lower-case letters, digits and hyphens",
        );
    }
    Ok(())
}

/// A branch, narrower than Git has it.
pub(crate) fn branch(name: &str) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
    let whole = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.ends_with('.')
            && !part.to_ascii_lowercase().ends_with(".lock")
    };
    let fits = name.len() <= 200
        && name.bytes().all(plain)
        && !name.contains("..")
        && name.split('/').all(whole)
        && name != "HEAD";
    if fits {
        Ok(())
    } else {
        refuse(
            "the branch",
            name,
            "use letters, digits, `.`, `_`, `-` and `/`, such as task/storage",
        )
    }
}

/// A full commit id.
pub(crate) fn sha(sha: &Sha) -> Result<(), Error> {
    let text = sha.as_str();
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() == 40 && text.bytes().all(hex) {
        Ok(())
    } else {
        refuse(
            "the commit",
            text,
            "a commit is named by 40 lower-case hexadecimal digits",
        )
    }
}

/// The path of a file in a repository.
pub(crate) fn path(path: &str) -> Result<(), Error> {
    match path_fault(path) {
        None => Ok(()),
        Some(reason) => refuse("the path", path, reason),
    }
}

/// What is wrong with a path, if anything.
pub(crate) fn path_fault(path: &str) -> Option<&'static str> {
    if path.is_empty() {
        return Some("it is empty");
    }
    if path.len() > 4000 || path.split('/').any(|part| part.len() > 255) {
        return Some("it is too long");
    }
    if path.starts_with('/') {
        return Some("it is absolute");
    }
    if path.chars().any(char::is_control) {
        return Some("it holds a control character");
    }
    if path.contains('\\') {
        return Some("it holds a backslash");
    }
    for part in path.split('/') {
        match part {
            "" => return Some("it has an empty part"),
            "." | ".." => return Some("it has a part `.` or `..`"),
            _ => {}
        }
        // As file systems of other machines understand it.
        let plain = part.trim_end_matches([' ', '.']);
        if plain.eq_ignore_ascii_case(".git") || plain.eq_ignore_ascii_case("git~1") {
            return Some("it leads into Git's own folder");
        }
    }
    None
}

/// The key of a commit: one line.
pub(crate) fn key(key: &str) -> Result<(), Error> {
    let fits =
        !key.is_empty() && key.len() <= 200 && key.bytes().all(|byte| byte.is_ascii_graphic());
    if fits {
        Ok(())
    } else {
        refuse(
            "the key",
            key,
            "it is one word of at most 200 printable characters",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_never_leads_out_of_the_tree_or_into_git() {
        for good in [
            "a",
            "src/main.py",
            ".github/workflows/ci.yml",
            "дом/日本.txt",
            ".gitignore",
            "a b",
            "...x",
        ] {
            assert_eq!(path_fault(good), None, "{good}");
        }
        for bad in [
            "",
            "/etc/passwd",
            "../x",
            "a/../b",
            "a//b",
            "a/",
            "./a",
            ".git/config",
            "a/.GIT/hooks/x",
            ".git./x",
            "git~1",
            "a\nb",
            "a\0b",
            "a\\b",
            "\u{7f}",
            &"a".repeat(256),
            &"a/".repeat(3000),
        ] {
            assert!(path_fault(bad).is_some(), "{bad:?}");
        }
    }

    #[test]
    fn a_branch_is_never_an_option_or_another_kind_of_ref() {
        for good in ["main", "task/storage", "job-1/api.v2"] {
            assert!(branch(good).is_ok(), "{good}");
        }
        for bad in [
            "", "-x", "a/-x", "a..b", "a//b", "/a", "a/", ".a", "a.lock", "a.", "a b", "a~1",
            "a@{1}", "a:b", "HEAD", "é",
        ] {
            assert!(branch(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_commit_is_named_in_full() {
        assert!(sha(&Sha::new("a".repeat(40))).is_ok());
        for bad in ["main", "--all", "abc", &"A".repeat(40), &"a".repeat(41)] {
            assert!(sha(&Sha::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_project_is_never_a_way_out_of_its_folder() {
        assert!(project(&ProjectId::founded_by("x")).is_ok());
        for bad in ["", "../x", "a/b", ".", "A", "-x"] {
            assert!(project(&ProjectId::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_key_cannot_add_lines_to_a_commit() {
        assert!(key("job-1/scaffold:1").is_ok());
        for bad in ["", "a b", "a\nSigned-off-by: x", &"k".repeat(201)] {
            assert!(key(bad).is_err(), "{bad:?}");
        }
    }
}
