//! The contract of a forge, as functions that panic where it is broken. Every forge's tests run each of them, on a project
//! of its own that has no repository yet.
//!
//! Each one does every step twice where it can: a step that is repeated after a crash must change nothing more.

mod files;
mod merges;
mod pulls;

pub use files::*;
pub use merges::*;
pub use pulls::*;

use ports::{FileChange, Forge, NewPullRequest, ProjectId, PullRequest, Sha, Slug};

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
