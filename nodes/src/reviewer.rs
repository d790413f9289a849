//! The reviewer: has the repository's checks run at the commit, reads the diff against the task, and merges exactly the commit
//! that passed both, after a rebase when others were merged first. Or it sends the work back with comments, three rounds at
//! most; then a person decides.

use graph::{Arrived, Context, WaitFor};
use ports::{
    Actor, Audience, CheckStatus, ChecksReport, Choice, Errand, ErrandOutcome, ErrandWork, Event,
    Failure, MergeOutcome, OpenWait, RebaseOutcome, ReviewVerdict, Role, Sha, WaitId, WaitKind,
};
use serde_json::json;

use crate::{
    Crew,
    answers::Verdict,
    architect::pretty,
    ask::{self, Question},
    effect::{Next, Stop, clock, effect, later},
    job::PendingErrand,
    person, prompts,
    scope::within_project,
    task::{Task, TaskEnd},
};

/// How many outcomes of other errands are passed over in one go.
const MAX_TAKEN: usize = 50;

/// How much of a failed check's log goes back to the developer, in bytes.
const LOG_BYTES: usize = 6 * 1024;

/// How many files in conflict are named.
const MAX_FILES: usize = 50;

/// How many of the latest comments a further review is reminded of.
const MAX_EARLIER: usize = 20;

pub(crate) async fn work(crew: &Crew, task: &mut Task, ctx: &Context) -> Result<Next, Stop> {
    if let Some(reply) = task.desk.take() {
        if reply.is(person::GIVE_UP) {
            return task.give_up(crew, ctx, &reply).await;
        }
        if let Some(advice) = reply.advice() {
            task.steer(advice);
        }
        task.rebases = 0;
        if reply.is(person::MERGE) {
            task.approved = true;
            task.comments.clear();
        } else if !task.comments.is_empty() {
            // The cap of rounds was reached, and a person grants more of them.
            task.send_backs = 0;
            return Ok(Next::Node("developer"));
        }
    }
    if let Some(errand) = task.errand.clone() {
        return receive_checks(crew, task, ctx, &errand).await;
    }
    if task.checked.as_ref() != Some(task.head()?) {
        return hand_over_checks(crew, task, ctx).await;
    }
    if task.approved {
        merge(crew, task, ctx).await
    } else {
        review(crew, task, ctx).await
    }
}

/// The key of an errand of this thread; the same whenever it is handed over again after a crash.
pub(crate) fn errand_key(ctx: &Context, number: u32) -> String {
    format!("{}:{}:checks:{number}", ctx.thread(), ctx.branch())
}

/// Has the checks run at the commit.
async fn hand_over_checks(crew: &Crew, task: &mut Task, ctx: &Context) -> Result<Next, Stop> {
    let sha = task.head()?.clone();
    task.errands += 1;
    let errand = Errand {
        key: errand_key(ctx, task.errands),
        reply_to: ctx.thread().to_string(),
        work: ErrandWork::Checks {
            project: task.scope.project.clone(),
            sha: sha.clone(),
        },
    };
    effect(ctx, "hand over", || crew.errands.hand_over(&errand)).await?;
    let now = clock(ctx, "clock").await?;
    task.errand = Some(PendingErrand {
        key: errand.key,
        sha,
        until: later(now, task.policy.checks_wait_s),
    });
    Ok(Next::Node("reviewer"))
}

/// Waits for the checks; what failed goes back with its log.
async fn receive_checks(
    crew: &Crew,
    task: &mut Task,
    ctx: &Context,
    errand: &PendingErrand,
) -> Result<Next, Stop> {
    let outcome = await_errand(ctx, errand).await?;
    let Some(outcome) = outcome else {
        effect(ctx, "take back", || crew.errands.cancel(&errand.key)).await?;
        task.errand = None;
        return Err(Failure::new(
            "checks_lost",
            format!(
                "the checks of commit {} gave no result within {} s; look at the machine that runs them, then try again",
                errand.sha, task.policy.checks_wait_s
            ),
        )
        .actor(Actor::Admin)
        .into());
    };
    task.errand = None;
    match outcome {
        ErrandOutcome::Checks(report) => checked(crew, task, ctx, errand, &report),
        ErrandOutcome::Failed(failure) => Err(failure.into()),
        ErrandOutcome::Cancelled | ErrandOutcome::Deploy(_) => Err(Failure::new(
            "checks_cancelled",
            format!(
                "the checks of commit {} were stopped; try again",
                errand.sha
            ),
        )
        .into()),
    }
}

/// Waits for an errand's outcome; `None` when it took too long.
pub(crate) async fn await_errand(
    ctx: &Context,
    errand: &PendingErrand,
) -> Result<Option<ErrandOutcome>, Stop> {
    let what = WaitFor::new()
        .signal(ErrandOutcome::SIGNAL)
        .until(errand.until);
    for _ in 0..MAX_TAKEN {
        match ctx.wait_any("errand", &what).await? {
            Arrived::Signal(arrived) if arrived.key == errand.key => {
                return Ok(Some(arrived.payload().unwrap_or_else(|error| {
                    ErrandOutcome::Failed(Failure::new(
                        "bad_outcome",
                        format!(
                            "the outcome of errand {} cannot be read: {error}; try again",
                            errand.key
                        ),
                    ))
                })));
            }
            // An errand that was given up before.
            Arrived::Signal(_) | Arrived::Child(_) => {}
            Arrived::Timer => return Ok(None),
        }
    }
    Ok(None)
}

fn checked(
    crew: &Crew,
    task: &mut Task,
    ctx: &Context,
    errand: &PendingErrand,
    report: &ChecksReport,
) -> Result<Next, Stop> {
    let log = failed_checks(crew, report);
    task.scope.tell(
        ctx,
        Event::TaskChecked {
            sha: errand.sha.clone(),
            status: report.status,
            detail: log.clone(),
        },
    )?;
    if report.status == CheckStatus::Passed {
        task.checked = Some(errand.sha.clone());
        return Ok(Next::Node("reviewer"));
    }
    let how = if report.status == CheckStatus::TimedOut {
        "did not end in time"
    } else {
        "failed"
    };
    let comment = format!(
        "The repository's checks {how} at commit {}:\n{log}",
        errand.sha
    );
    Ok(send_back(crew, task, ctx, vec![comment], false))
}

/// What did not pass, with the end of its log.
fn failed_checks(crew: &Crew, report: &ChecksReport) -> String {
    let parts: Vec<String> = report
        .checks
        .iter()
        .filter(|check| check.status != CheckStatus::Passed)
        .map(|check| format!("{}:\n{}", check.name, check.detail.trim_end()))
        .collect();
    let text = parts.join("\n");
    let start = text.ceil_char_boundary(text.len().saturating_sub(LOG_BYTES));
    crew.vault.redact(text[start..].trim_end())
}

/// Asks the model for its verdict.
async fn review(crew: &Crew, task: &mut Task, ctx: &Context) -> Result<Next, Stop> {
    let pull = task.pull_request()?;
    let project = &task.scope.project;
    let bytes = task.policy.diff_bytes;
    let diff = effect(ctx, "diff", || crew.forge.diff(project, pull.number, bytes)).await?;
    if diff.head != *task.head()? {
        return Ok(head_moved(task, diff.head));
    }
    let planned = task.planned()?;
    let earlier = &task.earlier[task.earlier.len().saturating_sub(MAX_EARLIER)..];
    let prompt = prompts::render(
        Role::Reviewer.as_str(),
        "review",
        json!({
            "round": task.reviews + 1,
            "id": planned.id,
            "task": pretty(planned),
            "spec": task.spec.as_ref().map(pretty).unwrap_or_default(),
            "earlier": earlier,
            "summary": task.summary,
            "diff": diff.text,
            "truncated": diff.truncated,
            "files": diff.files,
        }),
    )?;
    let told = ask::typed::<Verdict>(
        crew,
        ctx,
        Question {
            role: Role::Reviewer,
            scope: &task.scope,
            thread: within_project(ctx),
            turn: task.turns,
            step: "review",
            prompt,
            since: Vec::new(),
        },
        |_| Ok(()),
    )
    .await?;
    task.turns += told.turns;
    let verdict = told.answer?;
    let comments: Vec<String> = verdict
        .comments
        .iter()
        .filter(|comment| !comment.trim().is_empty())
        .map(|comment| crew.vault.redact(comment))
        .collect();
    task.reviews += 1;
    task.scope.tell(
        ctx,
        Event::TaskReviewed {
            round: task.reviews,
            verdict: verdict.verdict,
            comments: comments.clone(),
        },
    )?;
    task.earlier.extend(comments.iter().cloned());
    match verdict.verdict {
        ReviewVerdict::Approve => {
            task.approved = true;
            Ok(Next::Node("reviewer"))
        }
        ReviewVerdict::SendBack => Ok(send_back(crew, task, ctx, comments, true)),
    }
}

/// Sends the work back, or asks a person when that was done often enough. `passed`: its checks passed, so it could be merged.
fn send_back(
    crew: &Crew,
    task: &mut Task,
    ctx: &Context,
    comments: Vec<String>,
    passed: bool,
) -> Next {
    let checked = task.checked.clone();
    task.send_back(comments);
    task.send_backs += 1;
    if task.send_backs < task.policy.max_review_rounds {
        return Next::Node("developer");
    }
    if passed {
        // Should a person merge it as it is: its checks hold.
        task.checked = checked;
    }
    ask_after_rounds(crew, task, ctx, passed);
    Next::Node(person::NODE)
}

fn ask_after_rounds(crew: &Crew, task: &mut Task, ctx: &Context, passed: bool) {
    let title = task.planned.as_ref().map_or_else(String::new, |planned| {
        format!("{} (`{}`)", planned.title, planned.id)
    });
    let points: Vec<String> = task
        .comments
        .iter()
        .map(|comment| format!("- {}", ask::end_of(comment)))
        .collect();
    let points = points.join("\n");
    let text = format!(
        "**Task {title} was sent back {} times.** What is still wanted:\n\n{points}",
        task.send_backs
    );
    let mut options = vec![Choice::new(person::RETRY, "Another round")];
    if passed {
        options.push(Choice::new(person::MERGE, "Merge it anyway"));
    }
    options.push(Choice::new(person::GIVE_UP, "Give up"));
    let wait = OpenWait {
        id: WaitId::new(""),
        kind: WaitKind::Help,
        question: crew.vault.redact(&text),
        options,
        free_text: true,
        audience: Audience::Owner,
    };
    let rounds = task.send_backs;
    let question = task.desk.ask(ctx, "reviewer", wait);
    question.also.push(crate::signal::RETRY.to_owned());
    question.failure = Some(
        Failure::new(
            "review_rounds",
            format!("the work was sent back {rounds} times and given up then"),
        )
        .evidence(points),
    );
}

/// Merges exactly the commit that was checked and approved.
async fn merge(crew: &Crew, task: &mut Task, ctx: &Context) -> Result<Next, Stop> {
    let project = task.scope.project.clone();
    let number = task.pull_request()?.number;
    let head = task.head()?.clone();
    match effect(ctx, "merge", || crew.forge.merge(&project, number, &head)).await? {
        MergeOutcome::Merged { sha } => {
            task.scope.tell(
                ctx,
                Event::TaskMerged {
                    number,
                    sha: sha.clone(),
                },
            )?;
            Ok(task.end(ctx, TaskEnd::Merged, Some(sha), None)?)
        }
        MergeOutcome::HeadMoved { head } => {
            moved_once_more(task)?;
            Ok(head_moved(task, head))
        }
        MergeOutcome::BaseMoved => rebase(crew, task, ctx).await,
    }
}

/// Somebody else pushed to the branch: what was checked and approved is not what is there.
fn head_moved(task: &mut Task, head: Sha) -> Next {
    task.head = Some(head);
    task.checked = None;
    task.approved = false;
    Next::Node("reviewer")
}

/// Counts how often the branch has moved; at the cap a person is asked.
fn moved_once_more(task: &mut Task) -> Result<(), Stop> {
    task.rebases += 1;
    if task.rebases > task.policy.max_rebases {
        return Err(Failure::new(
            "always_moved",
            format!(
                "branch {} was moved {} times, and others were merged first every time; try again when less is under way",
                task.branch, task.policy.max_rebases
            ),
        )
        .into());
    }
    Ok(())
}

/// Others were merged first: moves the branch onto them. Its checks have to run again; the review holds.
async fn rebase(crew: &Crew, task: &mut Task, ctx: &Context) -> Result<Next, Stop> {
    moved_once_more(task)?;
    let project = task.scope.project.clone();
    let pull = task.pull_request()?.clone();
    match effect(ctx, "rebase", || crew.forge.rebase(&project, pull.number)).await? {
        RebaseOutcome::UpToDate { head } | RebaseOutcome::Rebased { head } => {
            if task.head.as_ref() != Some(&head) {
                task.scope.tell(
                    ctx,
                    Event::PullRequestOpened {
                        number: pull.number,
                        url: pull.url.clone(),
                        head: head.clone(),
                    },
                )?;
                task.head = Some(head);
                task.checked = None;
            }
            Ok(Next::Node("reviewer"))
        }
        RebaseOutcome::Conflict { files } => {
            let branch = task.repository()?.default_branch.clone();
            let tip = effect(ctx, "tip", || crew.forge.head(&project, &branch)).await?;
            let tip = tip.map_or_else(|| branch.clone(), |sha| sha.to_string());
            let shown = files
                .iter()
                .take(MAX_FILES)
                .cloned()
                .collect::<Vec<_>>()
                .join(", ");
            let comment = format!(
                "Others were merged first, and this branch is in conflict with {branch} (now at {tip}) in: {shown}. \
                 Merge origin/{branch} into the branch, resolve the conflicts so that both changes work, run the checks, and commit the merge."
            );
            Ok(send_back(crew, task, ctx, vec![comment], false))
        }
    }
}
