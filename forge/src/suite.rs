//! The contract of a forge, as functions that panic where it is broken. Every forge's tests run each of them, on a project
//! of its own that has no repository yet.
//!
//! Each one does every step twice where it can: a step that is repeated after a crash must change nothing more.

use ports::{
    FileChange, Forge, MergeOutcome, NewPullRequest, ProjectId, PullRequest, PullRequestStatus,
    RebaseOutcome, Sha, Slug,
};

/// Runs a list of the suite's functions as tests: `each!(name of a macro)` calls it with every function's name.
#[macro_export]
macro_rules! each {
    ($test:ident) => {
        $test! {
            a_repository_is_created_once
            files_are_committed_once_per_key
            a_commit_on_a_moved_branch_is_refused
            a_key_in_somebodys_message_is_not_a_key
            hostile_names_are_refused
            files_are_listed_and_read
            a_pull_request_is_opened_once
            a_pull_request_needs_the_commit_that_it_names
            a_diff_shows_what_changed_and_is_cut
            exactly_the_reviewed_commit_is_merged_once
            a_branch_behind_the_tip_is_rebased_before_its_merge
            branches_from_different_tips_are_all_merged
            a_conflict_names_its_files_and_changes_nothing
            what_is_merged_elsewhere_drops_out
            a_closed_pull_request_is_not_merged
        }
    };
}

/// A file with a content.
pub fn file(path: &str, content: &str) -> FileChange {
    FileChange {
        path: path.to_owned(),
        content: Some(content.to_owned()),
    }
}

/// Creates the project's repository and gives its first commit.
pub async fn begin(forge: &dyn Forge, project: &ProjectId) -> Sha {
    let slug = Slug::from_title("My notes");
    forge
        .create_repository(project, &slug)
        .await
        .expect("a repository");
    main(forge, project).await
}

/// The tip of the default branch.
pub async fn main(forge: &dyn Forge, project: &ProjectId) -> Sha {
    let head = forge
        .head(project, crate::DEFAULT_BRANCH)
        .await
        .expect("its head");
    head.expect("the default branch")
}

/// Commits one file to a branch.
pub async fn commit(
    forge: &dyn Forge,
    project: &ProjectId,
    branch: &str,
    base: &Sha,
    path: &str,
    content: &str,
) -> Sha {
    let key = format!("{branch}:{base}");
    forge
        .commit_files(
            project,
            branch,
            base,
            &format!("Change {path}"),
            &[file(path, content)],
            &key,
        )
        .await
        .expect("a commit")
}

/// A pull request as it is asked for.
pub fn request(project: &ProjectId, branch: &str, head: &Sha) -> NewPullRequest {
    NewPullRequest {
        project: project.clone(),
        branch: branch.to_owned(),
        head: head.clone(),
        title: format!("Work on {branch}"),
        body: "What was done and why.".to_owned(),
    }
}

/// Opens a pull request for a branch.
pub async fn open(forge: &dyn Forge, project: &ProjectId, branch: &str, head: &Sha) -> PullRequest {
    let new = request(project, branch, head);
    forge.open_pull_request(&new).await.expect("a pull request")
}

fn kind<T>(result: ports::Result<T>) -> String {
    match result {
        Ok(_) => "nothing was refused".to_owned(),
        Err(failure) => failure.kind,
    }
}

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

/// One branch, one pull request; its head follows; numbers have no gaps.
pub async fn a_pull_request_is_opened_once(forge: &dyn Forge, project: &ProjectId) {
    let base = begin(forge, project).await;
    let one = commit(forge, project, "task/one", &base, "one", "1").await;
    let first = open(forge, project, "task/one", &one).await;
    assert_eq!((first.number, first.status), (1, PullRequestStatus::Open));
    assert_eq!(
        (first.head.clone(), first.merged.clone()),
        (one.clone(), None)
    );
    assert_eq!(open(forge, project, "task/one", &one).await, first);
    let two = commit(forge, project, "task/two", &base, "two", "2").await;
    assert_eq!(open(forge, project, "task/two", &two).await.number, 2);
    let more = commit(forge, project, "task/one", &one, "one", "11").await;
    assert_eq!(forge.pull_request(project, 1).await.unwrap().head, more);
    let again = open(forge, project, "task/one", &more).await;
    assert_eq!((again.number, &again.head), (1, &more));
    assert_eq!(forge.pull_request(project, 1).await.unwrap(), again);
    assert_eq!(
        kind(forge.pull_request(project, 3).await),
        "no_pull_request"
    );
}

/// A branch that is missing, elsewhere, or without work gets no pull request.
pub async fn a_pull_request_needs_the_commit_that_it_names(forge: &dyn Forge, project: &ProjectId) {
    let base = begin(forge, project).await;
    let refused = forge
        .open_pull_request(&request(project, "task/none", &base))
        .await;
    assert_eq!(kind(refused), "no_branch");
    let head = commit(forge, project, "task/x", &base, "x", "1").await;
    let refused = forge
        .open_pull_request(&request(project, "task/x", &base))
        .await;
    assert_eq!(kind(refused), "head_moved");
    let pull = open(forge, project, "task/x", &head).await;
    forge.merge(project, pull.number, &head).await.unwrap();
    let tip = main(forge, project).await;
    commit(forge, project, "main", &tip, "more", "1").await;
    let behind = commit(forge, project, "task/y", &tip, "more", "1").await;
    let pull = open(forge, project, "task/y", &behind).await;
    assert_eq!(pull.number, 2);
    let refused = forge
        .open_pull_request(&request(project, "main", &main(forge, project).await))
        .await;
    assert_eq!(kind(refused), "no_commit");
}

/// The diff is against the merge base, names its files, and keeps to its size.
pub async fn a_diff_shows_what_changed_and_is_cut(forge: &dyn Forge, project: &ProjectId) {
    let first = begin(forge, project).await;
    let base = commit(forge, project, "main", &first, "kept", "old\n").await;
    let files = [file("kept", "new\n"), file("дом", &"line\n".repeat(1000))];
    let head = forge
        .commit_files(project, "task/x", &base, "Work", &files, "x")
        .await
        .unwrap();
    let pull = open(forge, project, "task/x", &head).await;
    // What happens on the default branch meanwhile is no part of it.
    commit(forge, project, "main", &base, "elsewhere", "x").await;
    let diff = forge.diff(project, pull.number, 1 << 20).await.unwrap();
    assert_eq!(
        (&diff.base, &diff.head, diff.truncated),
        (&base, &head, false)
    );
    let mut names = diff.files.clone();
    names.sort();
    assert_eq!(names, ["kept", "дом"]);
    assert!(
        diff.text.contains("-old\n+new\n") && diff.text.contains("дом"),
        "{}",
        diff.text
    );
    let cut = forge.diff(project, pull.number, 300).await.unwrap();
    assert!(cut.truncated && cut.text.len() <= 300 && !cut.text.is_empty());
    assert_eq!(cut.files.len(), 2);
}

/// Only the commit that was reviewed is merged, as a merge commit on the tip, and only once.
pub async fn exactly_the_reviewed_commit_is_merged_once(forge: &dyn Forge, project: &ProjectId) {
    let base = begin(forge, project).await;
    let head = commit(forge, project, "task/x", &base, "x", "1").await;
    let pull = open(forge, project, "task/x", &head).await;
    let later = commit(forge, project, "task/x", &head, "x", "22").await;
    let moved = forge.merge(project, pull.number, &head).await.unwrap();
    assert_eq!(
        moved,
        MergeOutcome::HeadMoved {
            head: later.clone()
        }
    );
    assert_eq!(main(forge, project).await, base);
    let merged = forge.merge(project, pull.number, &later).await.unwrap();
    let MergeOutcome::Merged { sha } = merged.clone() else {
        panic!("{merged:?}");
    };
    assert_eq!(main(forge, project).await, sha);
    assert_ne!(sha, later, "a merge is a commit of its own");
    assert_eq!(
        forge.merge(project, pull.number, &later).await.unwrap(),
        merged
    );
    assert_eq!(main(forge, project).await, sha);
    assert_eq!(forge.list_files(project, &sha).await.unwrap(), ["x"]);
    let pull = forge.pull_request(project, pull.number).await.unwrap();
    assert_eq!(
        (pull.status, pull.merged.as_ref()),
        (PullRequestStatus::Merged, Some(&sha))
    );
    assert_eq!(open(forge, project, "task/x", &later).await, pull);
    let diff = forge.diff(project, pull.number, 10_000).await.unwrap();
    assert_eq!(diff.files, ["x"]);
    forge.close(project, pull.number).await.unwrap();
    assert_eq!(
        forge
            .pull_request(project, pull.number)
            .await
            .unwrap()
            .status,
        PullRequestStatus::Merged
    );
}

/// Of two branches from one base the second is refused, rebased, and then merged.
pub async fn a_branch_behind_the_tip_is_rebased_before_its_merge(
    forge: &dyn Forge,
    project: &ProjectId,
) {
    let base = begin(forge, project).await;
    let one = commit(forge, project, "task/one", &base, "one", "1").await;
    let two = commit(forge, project, "task/two", &base, "two", "2").await;
    let two = commit(forge, project, "task/two", &two, "two/more", "23").await;
    let two = {
        // The same path as a file and then as a folder would conflict with itself: undo it.
        let files = [
            FileChange {
                path: "two/more".to_owned(),
                content: None,
            },
            file("two", "234"),
        ];
        forge
            .commit_files(project, "task/two", &two, "Undo", &files, "undo")
            .await
            .unwrap()
    };
    let (first, second) = (
        open(forge, project, "task/one", &one).await,
        open(forge, project, "task/two", &two).await,
    );
    let outcome = forge.rebase(project, second.number).await.unwrap();
    assert_eq!(outcome, RebaseOutcome::UpToDate { head: two.clone() });
    forge.merge(project, first.number, &one).await.unwrap();
    let tip = main(forge, project).await;
    assert_eq!(
        forge.merge(project, second.number, &two).await.unwrap(),
        MergeOutcome::BaseMoved
    );
    assert_eq!(main(forge, project).await, tip);
    let outcome = forge.rebase(project, second.number).await.unwrap();
    let RebaseOutcome::Rebased { head } = outcome.clone() else {
        panic!("{outcome:?}");
    };
    let again = forge.rebase(project, second.number).await.unwrap();
    assert_eq!(again, RebaseOutcome::UpToDate { head: head.clone() });
    assert_eq!(
        forge.head(project, "task/two").await.unwrap(),
        Some(head.clone())
    );
    assert_eq!(
        forge
            .pull_request(project, second.number)
            .await
            .unwrap()
            .head,
        head
    );
    let stale = forge.merge(project, second.number, &two).await.unwrap();
    assert_eq!(stale, MergeOutcome::HeadMoved { head: head.clone() });
    let merged = forge.merge(project, second.number, &head).await.unwrap();
    assert!(matches!(merged, MergeOutcome::Merged { .. }), "{merged:?}");
    let tip = main(forge, project).await;
    assert_eq!(
        forge.list_files(project, &tip).await.unwrap(),
        ["one", "two"]
    );
    assert_eq!(
        forge
            .read_file(project, &tip, "two")
            .await
            .unwrap()
            .as_deref(),
        Some("234")
    );
}

/// Of three branches, one begins at the merge of another; in the end the default branch holds them all.
pub async fn branches_from_different_tips_are_all_merged(forge: &dyn Forge, project: &ProjectId) {
    let base = begin(forge, project).await;
    let inner = commit(forge, project, "task/inner", &base, "inner", "1").await;
    let inner_pull = open(forge, project, "task/inner", &inner).await;
    let outer = commit(forge, project, "task/outer", &base, "outer", "2").await;
    let outer_pull = open(forge, project, "task/outer", &outer).await;
    forge
        .merge(project, inner_pull.number, &inner)
        .await
        .unwrap();
    // A commit on a branch that begins at a merge commit.
    let tip = main(forge, project).await;
    let later = commit(forge, project, "task/later", &tip, "later", "3").await;
    let later_pull = open(forge, project, "task/later", &later).await;
    for number in [outer_pull.number, later_pull.number] {
        let head = match forge.rebase(project, number).await.unwrap() {
            RebaseOutcome::Rebased { head } | RebaseOutcome::UpToDate { head } => head,
            RebaseOutcome::Conflict { files } => panic!("{files:?}"),
        };
        let merged = forge.merge(project, number, &head).await.unwrap();
        assert!(matches!(merged, MergeOutcome::Merged { .. }), "{merged:?}");
    }
    let tip = main(forge, project).await;
    assert_eq!(
        forge.list_files(project, &tip).await.unwrap(),
        ["inner", "later", "outer"]
    );
}

/// A conflict names its files; branch, pull request and default branch stay.
pub async fn a_conflict_names_its_files_and_changes_nothing(
    forge: &dyn Forge,
    project: &ProjectId,
) {
    let first = begin(forge, project).await;
    let base = commit(forge, project, "main", &first, "дом/file", "0\n").await;
    let one = commit(forge, project, "task/one", &base, "дом/file", "one\n").await;
    let files = [file("дом/file", "the other\n"), file("fine", "x")];
    let two = forge
        .commit_files(project, "task/two", &base, "Two", &files, "two")
        .await
        .unwrap();
    let (first, second) = (
        open(forge, project, "task/one", &one).await,
        open(forge, project, "task/two", &two).await,
    );
    forge.merge(project, first.number, &one).await.unwrap();
    let tip = main(forge, project).await;
    for _ in 0..2 {
        let outcome = forge.rebase(project, second.number).await.unwrap();
        assert_eq!(
            outcome,
            RebaseOutcome::Conflict {
                files: vec!["дом/file".to_owned()]
            }
        );
    }
    assert_eq!(
        forge.merge(project, second.number, &two).await.unwrap(),
        MergeOutcome::BaseMoved
    );
    assert_eq!(
        forge.head(project, "task/two").await.unwrap(),
        Some(two.clone())
    );
    assert_eq!(
        forge
            .pull_request(project, second.number)
            .await
            .unwrap()
            .head,
        two
    );
    assert_eq!(main(forge, project).await, tip);
}

/// A commit whose change the tip has already is left out by a rebase, the others stay.
pub async fn what_is_merged_elsewhere_drops_out(forge: &dyn Forge, project: &ProjectId) {
    let base = begin(forge, project).await;
    let one = commit(forge, project, "task/one", &base, "same", "1\n").await;
    let same = forge
        .commit_files(
            project,
            "task/two",
            &base,
            "The same",
            &[file("same", "1\n")],
            "same",
        )
        .await
        .unwrap();
    let two = commit(forge, project, "task/two", &same, "own", "2\n").await;
    let (first, second) = (
        open(forge, project, "task/one", &one).await,
        open(forge, project, "task/two", &two).await,
    );
    forge.merge(project, first.number, &one).await.unwrap();
    let outcome = forge.rebase(project, second.number).await.unwrap();
    assert!(
        matches!(outcome, RebaseOutcome::Rebased { .. }),
        "{outcome:?}"
    );
    let diff = forge.diff(project, second.number, 10_000).await.unwrap();
    assert_eq!(diff.files, ["own"]);
}

/// Closing is idempotent; what is closed is neither merged nor rebased, and opening its branch again opens it again.
pub async fn a_closed_pull_request_is_not_merged(forge: &dyn Forge, project: &ProjectId) {
    let base = begin(forge, project).await;
    let head = commit(forge, project, "task/x", &base, "x", "1").await;
    let pull = open(forge, project, "task/x", &head).await;
    for _ in 0..2 {
        forge.close(project, pull.number).await.unwrap();
        let closed = forge.pull_request(project, pull.number).await.unwrap();
        assert_eq!(
            (closed.status, closed.head),
            (PullRequestStatus::Closed, head.clone())
        );
    }
    assert_eq!(
        kind(forge.merge(project, pull.number, &head).await),
        "pull_request_closed"
    );
    assert_eq!(
        kind(forge.rebase(project, pull.number).await),
        "pull_request_closed"
    );
    assert_eq!(main(forge, project).await, base);
    let again = open(forge, project, "task/x", &head).await;
    assert_eq!(again.status, PullRequestStatus::Open);
    let merged = forge.merge(project, again.number, &head).await.unwrap();
    assert!(matches!(merged, MergeOutcome::Merged { .. }), "{merged:?}");
    assert_eq!(kind(forge.close(project, 99).await), "no_pull_request");
}
