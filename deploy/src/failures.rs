//! Failures of deploying itself, with who can act.

use std::io;
use std::path::Path;

use ports::{Actor, Failure};

/// Something with a file went wrong.
pub(crate) fn file(doing: &str, path: &Path, error: &io::Error) -> Failure {
    let at = path.display();
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => disk_full(&format!("{at}")),
        _ => Failure::new(
            "deploy_file",
            format!("{doing} failed at {at}: {error}; check the folder's owner and rights"),
        )
        .actor(Actor::Admin)
        .retryable(),
    }
}

pub(crate) fn disk_full(at: &str) -> Failure {
    Failure::new(
        "disk_full",
        format!("the disk is full, writing {at} failed; free some space and deploy again"),
    )
    .actor(Actor::Admin)
    .retryable()
}

pub(crate) fn port_taken(port: u16) -> Failure {
    Failure::new(
        "port_taken",
        format!("port {port} on 127.0.0.1 is used by another program; another port is needed"),
    )
    .retryable()
}

pub(crate) fn supervisor(message: &str) -> Failure {
    Failure::new("supervisor", message.to_owned())
        .actor(Actor::Admin)
        .retryable()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_apart() {
        let full = io::Error::from_raw_os_error(28);
        assert_eq!(file("writing", Path::new("/x"), &full).kind, "disk_full");
        let other = io::Error::from_raw_os_error(13);
        let failure = file("writing", Path::new("/x"), &other);
        assert_eq!(failure.kind, "deploy_file");
        assert!(failure.message.contains("/x"), "{failure}");
    }
}
