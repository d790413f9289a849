//! Repositories, commits and files.

use super::{begin, commit, file, kind, main};
use ports::{FileChange, Forge, ProjectId, Sha, Slug};

/// Creating twice gives the same repository, with one commit and no file.
pub async fn a_repository_is_created_once(forge: &dyn Forge, project: &ProjectId) {
    assert_eq!(forge.repository(project).await.unwrap(), None);
    assert_eq!(kind(forge.head(project, "main").await), "no_repository");
    let slug = Slug::from_title("My notes");
    let first = forge.create_repository(project, &slug).await.unwrap();
    let head = main(forge, project).await;
    let again = forge.create_repository(project, &slug).await.unwrap();
    assert_eq!(first, again);
    assert_eq!(
        forge.repository(project).await.unwrap(),
        Some(first.clone())
    );
    assert_eq!(first.default_branch, "main");
    assert_eq!(main(forge, project).await, head);
    assert_eq!(
        forge.list_files(project, &head).await.unwrap(),
        Vec::<String>::new()
    );
    assert_eq!(forge.head(project, "task/none").await.unwrap(), None);
}

/// The same key finds the commit that it made, also when its base is outdated or is that commit; another key makes another.
pub async fn files_are_committed_once_per_key(forge: &dyn Forge, project: &ProjectId) {
    let base = begin(forge, project).await;
    let files = [
        file("README.md", "# Notes\n"),
        file("src/app.py", "print()\n"),
    ];
    let put = async |base: &Sha, files: &[FileChange], key: &str| {
        forge
            .commit_files(
                project,
                "main",
                base,
                "Scaffold\n\nWith a body.",
                files,
                key,
            )
            .await
    };
    let first = put(&base, &files, "job-1/scaffold").await.unwrap();
    assert_ne!(first, base);
    assert_eq!(put(&base, &files, "job-1/scaffold").await.unwrap(), first);
    assert_eq!(put(&first, &files, "job-1/scaffold").await.unwrap(), first);
    let delete = [
        FileChange {
            path: "src/app.py".to_owned(),
            content: None,
        },
        file("src/app.py/now/a/folder", "x"),
    ];
    let second = put(&first, &delete, "job-2/scaffold").await.unwrap();
    assert_eq!(main(forge, project).await, second);
    assert_eq!(put(&base, &files, "job-1/scaffold").await.unwrap(), first);
    assert_eq!(
        forge.list_files(project, &second).await.unwrap(),
        ["README.md", "src/app.py/now/a/folder"]
    );
    assert_eq!(
        forge.list_files(project, &first).await.unwrap(),
        ["README.md", "src/app.py"]
    );
    let branched = forge
        .commit_files(project, "task/new", &base, "On a branch", &files, "branch")
        .await
        .unwrap();
    assert_eq!(
        forge.head(project, "task/new").await.unwrap(),
        Some(branched)
    );
    assert_eq!(main(forge, project).await, second);
}

/// A commit onto a base that is not the branch's commit is refused as `base_moved` and changes nothing.
pub async fn a_commit_on_a_moved_branch_is_refused(forge: &dyn Forge, project: &ProjectId) {
    let base = begin(forge, project).await;
    let tip = commit(forge, project, "main", &base, "a", "1").await;
    let refused = forge
        .commit_files(project, "main", &base, "Late", &[file("b", "2")], "late")
        .await;
    assert_eq!(kind(refused), "base_moved");
    assert_eq!(main(forge, project).await, tip);
    let nowhere = Sha::new("0123456789012345678901234567890123456789");
    let refused = forge
        .commit_files(
            project,
            "task/x",
            &nowhere,
            "Lost",
            &[file("b", "2")],
            "lost",
        )
        .await;
    assert_eq!(kind(refused), "unknown_commit");
    assert_eq!(forge.head(project, "task/x").await.unwrap(), None);
}

/// What a message says is not believed to be a key.
pub async fn a_key_in_somebodys_message_is_not_a_key(forge: &dyn Forge, project: &ProjectId) {
    let base = begin(forge, project).await;
    let message = format!("Title\n\n{}: stolen", crate::KEY_TRAILER);
    let first = forge
        .commit_files(project, "main", &base, &message, &[file("a", "1")], "own")
        .await
        .unwrap();
    let second = forge
        .commit_files(
            project,
            "main",
            &first,
            "Title",
            &[file("a", "2")],
            "stolen",
        )
        .await
        .unwrap();
    assert_ne!(first, second);
}

/// Paths, branches, commits and keys that could mean something else are refused before anything is done.
pub async fn hostile_names_are_refused(forge: &dyn Forge, project: &ProjectId) {
    let base = begin(forge, project).await;
    for path in [
        "../x",
        "/etc/passwd",
        ".git/config",
        "a/.GIT/hooks/x",
        "a\nb",
        "a\0b",
        "",
        "a//b",
        "a/./b",
    ] {
        let put = forge
            .commit_files(project, "main", &base, "m", &[file(path, "x")], "k")
            .await;
        assert_eq!(kind(put), "bad_name", "{path:?}");
        assert_eq!(
            kind(forge.read_file(project, &base, path).await),
            "bad_name",
            "{path:?}"
        );
    }
    for branch in ["-x", "../x", "a..b", "a b", "refs/heads/x.lock", ""] {
        let put = forge
            .commit_files(project, branch, &base, "m", &[file("a", "x")], "k")
            .await;
        assert_eq!(kind(put), "bad_name", "{branch:?}");
        assert_eq!(
            kind(forge.head(project, branch).await),
            "bad_name",
            "{branch:?}"
        );
    }
    for sha in ["--help", "main", ""] {
        assert_eq!(
            kind(forge.list_files(project, &Sha::new(sha)).await),
            "bad_name",
            "{sha:?}"
        );
    }
    let put = forge
        .commit_files(project, "main", &base, "m", &[file("a", "x")], "k\nl")
        .await;
    assert_eq!(kind(put), "bad_name");
    let stranger = ProjectId::new("../../tmp/x");
    assert!(forge.repository(&stranger).await.is_err());
    assert_eq!(main(forge, project).await, base);
}

/// Files of any name come back as they were; what is missing is `None`, what is too large is refused.
pub async fn files_are_listed_and_read(forge: &dyn Forge, project: &ProjectId) {
    let base = begin(forge, project).await;
    let texts = [
        ("дом/日本 \"語\".txt", "é\r\nno end"),
        ("empty", ""),
        ("-option", "--all"),
        ("*", "a star"),
    ];
    let mut files: Vec<FileChange> = texts.iter().map(|(path, text)| file(path, text)).collect();
    files.push(file("large", &"x".repeat((1 << 20) + 1)));
    let sha = forge
        .commit_files(project, "main", &base, "Files", &files, "files")
        .await
        .unwrap();
    for (path, text) in texts {
        let read = forge.read_file(project, &sha, path).await.unwrap();
        assert_eq!(read.as_deref(), Some(text), "{path}");
        assert_eq!(forge.read_file(project, &base, path).await.unwrap(), None);
    }
    assert_eq!(
        kind(forge.read_file(project, &sha, "large").await),
        "too_large"
    );
    assert_eq!(
        forge.read_file(project, &sha, "дом").await.unwrap(),
        None,
        "a folder is no file"
    );
    let mut listed = forge.list_files(project, &sha).await.unwrap();
    listed.sort();
    let mut expected: Vec<String> = files.into_iter().map(|file| file.path).collect();
    expected.sort();
    assert_eq!(listed, expected);
}
