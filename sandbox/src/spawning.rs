//! The one thread that starts processes.
//!
//! The kernel kills a child that asked to die with its parent when the *thread* that made it ends,
//! and a runtime's threads come and go. This one stays as long as the process.

use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};

type Request = (Command, std::sync::mpsc::SyncSender<std::io::Result<Child>>);

static THREAD: OnceLock<Mutex<Option<Sender<Request>>>> = OnceLock::new();

/// Starts a process from the thread that outlives every other.
pub(crate) fn spawn(command: Command) -> std::io::Result<Child> {
    let slot = THREAD.get_or_init(|| Mutex::new(None));
    let sender = {
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        match &*slot {
            Some(sender) => sender.clone(),
            None => slot.insert(start()?).clone(),
        }
    };
    let gone = || std::io::Error::other("the thread that starts processes is gone");
    let (reply, answer) = sync_channel(1);
    sender.send((command, reply)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

fn start() -> std::io::Result<Sender<Request>> {
    let (sender, requests) = channel::<Request>();
    std::thread::Builder::new()
        .name("sandbox-spawn".into())
        .spawn(move || {
            for (mut command, reply) in requests {
                if let Err(unwanted) = reply.send(command.spawn())
                    && let Ok(mut child) = unwanted.0
                {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
        })?;
    Ok(sender)
}
