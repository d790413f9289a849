//! Pull requests, what they show, and how they end without a merge.

use super::{begin, commit, file, kind, main, open, request};
use ports::{Forge, MergeOutcome, ProjectId, PullRequestStatus};

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
