//! The crew: three kinds of threads, seven members, and what they say to models and people.
//!
//! | thread | wiring | nodes |
//! | --- | --- | --- |
//! | conversation | [`conversation`] | brainstorm |
//! | job, its child | [`job`] | zavhoz → architect → developers → devops |
//! | task, a job's child | [`task`] | developer ⇄ reviewer |
//!
//! Each node is one file that reads like its description. Jobs and tasks have one node more, [`person`]: a wait with buttons.
//! What comes in is in [`signal`]; what happened goes to the journal as `ports::Event`; everything else outside is a port in
//! [`Crew`]. What may be done, and how often, is in [`Policy`].
//!
//! *Invariant:* nothing here knows a front end, a database or a provider. Clock, chance and the world are reached through
//! durable steps only, so that a node that runs again after a crash takes the same way and does nothing twice.
//!
//! # Starting and feeding a conversation
//! ```ignore
//! let (conversation, job, task) = nodes::graphs(&crew)?;
//! let engine = Engine::builder(store).graph(conversation).graph(job).graph(task).build().await?;
//! let thread = ports::threads::conversation(&project);
//! engine.start(&thread, nodes::conversation::GRAPH, &nodes::conversation::found(project, owner), options).await?;
//! engine.signal(&thread, nodes::signal::MESSAGE, &message.key, &message).await?;
//! // A wait: the event `wait.opened` names thread and kind; the kind is the key as well.
//! engine.signal(&wait_thread, &nodes::signal::answer(&wait), &nodes::signal::answer(&wait), &answer).await?;
//! ```

pub mod answers;
mod architect;
mod ask;
mod brainstorm;
pub mod conversation;
mod crew;
mod developer;
mod developers;
mod devops;
mod dispatch;
mod effect;
mod extract;
pub mod job;
pub mod person;
mod picture;
pub mod plan;
mod policy;
mod prompts;
mod reading;
mod reviewer;
mod scaffold;
mod scope;
pub mod signal;
mod talk;
pub mod task;
mod texts;
mod zavhoz;

use graph::{CompileError, CompiledGraph, NodeOptions, RetryPolicy};

pub use ask::MAX_REPAIRS;
pub use brainstorm::MAX_MESSAGE_BYTES;
pub use conversation::Conversation;
pub use crew::{Crew, Traceparent};
pub use job::Job;
pub use picture::Picture;
pub use policy::Policy;
pub use prompts::VERSION as PROMPTS_VERSION;
pub use scope::Scope;
pub use task::Task;

/// The thread to which a worker's result goes, by the id of its request.
pub fn thread_of_request(request: &ports::RequestId) -> Option<String> {
    developer::thread_of_request(request)
}

/// The graphs of conversations, jobs and tasks.
pub type Graphs = (
    CompiledGraph<Conversation>,
    CompiledGraph<Job>,
    CompiledGraph<Task>,
);

/// The crew's three graphs, to be given to an engine together.
pub fn graphs(crew: &Crew) -> Result<Graphs, CompileError> {
    Ok((
        conversation::graph(crew)?,
        job::graph(crew)?,
        task::graph(crew)?,
    ))
}

/// The crew's three graphs as one picture.
pub fn picture(crew: &Crew) -> Result<Picture, CompileError> {
    let (conversation, job, task) = graphs(crew)?;
    Ok(Picture::of(conversation.shape(), job.shape(), task.shape()))
}

/// How every node is run: a failure of the engine's own kind (a full disk, a lost connection) is tried again.
fn node_options() -> NodeOptions {
    NodeOptions::default().retry(RetryPolicy::default())
}

/// Puts every field that differs into an update.
macro_rules! changed {
    ($update:ident, $before:ident, $after:ident; $($field:ident),+ $(,)?) => {
        $(if $before.$field != $after.$field {
            $update = $update.$field($after.$field.clone());
        })+
    };
}
pub(crate) use changed;
