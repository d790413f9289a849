//! Merges and rebases.

use super::{begin, commit, file, main, open};
use ports::{FileChange, Forge, MergeOutcome, ProjectId, PullRequestStatus, RebaseOutcome};

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
