//! Somebody else's checkpointer: a type of its own around one of ours, as a stranger would write it, passes the suite. So the suite
//! needs nothing that only this crate can have.

mod storage;

use graph::{MemoryCheckpointer, conformance::Lab};
// What is handed on names nearly all of it.
#[allow(clippy::wildcard_imports)]
use graph::checkpoint::*;

/// Has what a checkpointer must have, and nothing that it may have.
#[derive(Clone, Debug, Default)]
struct Stranger {
    inner: MemoryCheckpointer,
}

storage::delegate::handed_on! {
    [impl Checkpointer for Stranger] [inner] {
        fn name(&self) -> &'static str {
            "stranger"
        }
    }
}

async fn lab() -> Lab {
    let stranger = Stranger::default();
    Lab::new(
        move || {
            let stranger = stranger.clone();
            async move { stranger }
        },
        (),
    )
    .await
}

graph::checkpointer_conformance!(lab());
