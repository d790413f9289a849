//! The commands.

use ports::{Failure, ProjectId, TaskId};

use super::{Outcome, Reply, Trouble, words};
use crate::update::Sender;
use crate::{FRONT, Shared, person, texts};

/// How much of what somebody typed for a name is repeated, in characters.
const NAME_CHARS: usize = 60;

/// The project that a command is about: the one it names, or the chat's. A name that cannot be one is not passed over: the
/// command would be about another project than its writer thinks.
async fn meant(shared: &Shared, sender: &Sender, rest: &str) -> Result<ProjectId, Trouble> {
    if let Some(name) = rest.split_whitespace().next() {
        let name: String = name.chars().take(NAME_CHARS).collect();
        return Ok(shared.desk.find(&name).await?);
    }
    let chat = shared.store.chat(FRONT, &sender.chat.to_string()).await?;
    chat.and_then(|chat| chat.project).ok_or_else(|| {
        Failure::new(
            "no_current_project",
            "This chat has no project yet: describe one, or choose one with /project NAME.",
        )
        .into()
    })
}

pub(super) async fn attend(
    shared: &Shared,
    sender: &Sender,
    key: &str,
    name: &str,
    rest: &str,
) -> Outcome {
    let who = person(sender.user);
    let chat = sender.chat.to_string();
    let answer = match name {
        "start" => texts::start(shared.tape.as_deref()),
        "help" => texts::help(),
        "new" => {
            shared.store.set_current_project(FRONT, &chat, None).await?;
            if !rest.is_empty() {
                return words(shared, sender, key, rest).await;
            }
            "Describe it in your next message.".to_owned()
        }
        "projects" => texts::projects(&shared.desk.projects().await?),
        "project" => {
            let project = meant(shared, sender, rest).await?;
            shared
                .store
                .set_current_project(FRONT, &chat, Some(&project))
                .await?;
            texts::status(&shared.desk.status(&project).await?)
        }
        "status" => {
            let project = meant(shared, sender, rest).await?;
            texts::status(&shared.desk.status(&project).await?)
        }
        "deploy" => {
            let project = meant(shared, sender, rest).await?;
            shared.desk.redeploy(&project, &who, key, false).await?;
            return Ok(Reply::Nothing);
        }
        "rollback" => {
            let project = meant(shared, sender, rest).await?;
            let deployment = shared.desk.rollback(&project, &who, key).await?;
            format!(
                "Release {} is live again at {}.",
                deployment.release, deployment.url
            )
        }
        "retry" => retry(shared, sender, rest).await?,
        "cancel" => {
            let project = meant(shared, sender, rest).await?;
            if shared.desk.cancel(&project, &who).await? {
                return Ok(Reply::Nothing);
            }
            "No job is running.".to_owned()
        }
        other => {
            let other: String = other.chars().take(NAME_CHARS).collect();
            format!("I do not know /{other}. What I know:\n\n{}", texts::help())
        }
    };
    Ok(Reply::Say(answer))
}

/// `/retry`, `/retry PROJECT`, `/retry TASK`, `/retry PROJECT TASK`.
async fn retry(shared: &Shared, sender: &Sender, rest: &str) -> Result<String, Trouble> {
    let (first, tail) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let named = if first.is_empty() {
        None
    } else {
        match shared.desk.find(first).await {
            Ok(project) => Some(project),
            Err(failure) if failure.kind == "no_project" => None,
            Err(failure) => return Err(failure.into()),
        }
    };
    let (project, task) = match named {
        Some(project) => (project, tail),
        None => (meant(shared, sender, "").await?, rest),
    };
    let task = task.split_whitespace().next().map(TaskId::new);
    let who = person(sender.user);
    Ok(if shared.desk.retry(&project, task.as_ref(), &who).await? {
        "It is tried again."
    } else {
        "Nothing waits for another try."
    }
    .to_owned())
}
