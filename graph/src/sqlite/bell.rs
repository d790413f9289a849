//! Messages between processes that share a file on one machine: datagrams.
//!
//! Whoever listens has a socket in a directory beside the file (its name with `-bell`); whoever has something to tell sends
//! it to all of them. That costs nothing while there is nothing to tell. A socket whose process has died is removed by the
//! next one that meets it.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use futures::stream::{BoxStream, StreamExt, unfold};
use tokio::net::UnixDatagram;

use crate::checkpoint::{Bell, MAX_MESSAGE_BYTES, StorageError};

/// Socket addresses are paths of at most 103 bytes on some systems, and 107 on others.
const MAX_ADDRESS_BYTES: usize = 103;

/// How often a message is offered to a process that has not taken the ones before, and after which time.
const OFFERS: u32 = 20;
const OFFER_AGAIN: Duration = Duration::from_millis(2);

/// The most processes that are told; the others poll.
const MAX_LISTENERS: usize = 256;

/// How the name of a socket begins until it can be told something.
const UNFINISHED: char = '.';

/// Nobody takes that long to give a socket its name.
const LEFT_BEHIND: Duration = Duration::from_mins(1);

#[derive(Debug)]
pub(super) struct SqliteBell {
    file: PathBuf,
}

impl SqliteBell {
    pub fn new(file: PathBuf) -> Self {
        Self { file }
    }

    async fn on_directory<T: Send + 'static>(
        &self,
        operation: &str,
        make: bool,
        work: impl FnOnce(Directory) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StorageError> {
        let file = self.file.clone();
        let done = tokio::task::spawn_blocking(move || work(Directory::beside(&file, make)?)).await;
        done.map_err(io::Error::other)
            .flatten()
            .map_err(|source| failed(operation, source))
    }
}

fn failed(operation: &str, source: io::Error) -> StorageError {
    StorageError::Backend {
        operation: operation.to_owned(),
        source: Box::new(source),
    }
}

/// The directory with the sockets.
struct Directory {
    path: PathBuf,
    /// Through which its entries have a short name, where its own is too long for an address.
    handle: Option<fs::File>,
}

impl Directory {
    fn beside(file: &Path, make: bool) -> io::Result<Self> {
        // Whatever way a process took to the file.
        let file = fs::canonicalize(file)?;
        let mut name = file
            .file_name()
            .ok_or_else(|| io::Error::other("the database has no file name"))?
            .to_owned();
        name.push("-bell");
        let path = file.with_file_name(name);
        if make {
            fs::create_dir_all(&path)?;
        }
        // A slash, a dot and 16 digits.
        let handle = if path.as_os_str().len() + 18 > MAX_ADDRESS_BYTES {
            Some(fs::File::open(&path)?)
        } else {
            None
        };
        Ok(Self { path, handle })
    }

    fn entry(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The address of a socket. Good as long as this lives.
    fn address(&self, name: &str) -> PathBuf {
        use std::os::fd::AsRawFd;

        match &self.handle {
            // Where there is no such thing, the address is refused, and processes poll.
            Some(handle) => PathBuf::from(format!("/proc/self/fd/{}/{name}", handle.as_raw_fd())),
            None => self.entry(name),
        }
    }

    /// Removes what processes left that died while they began to listen.
    fn tidy(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let left = entry.file_name().to_string_lossy().starts_with(UNFINISHED)
                && entry
                    .metadata()
                    .and_then(|metadata| metadata.modified())
                    .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > LEFT_BEHIND));
            if left {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            if let Ok(name) = entry?.file_name().into_string()
                && !name.starts_with(UNFINISHED)
                && names.len() < MAX_LISTENERS
            {
                names.push(name);
            }
        }
        Ok(names)
    }
}

/// A socket with a name. Dropping it takes the name away.
struct Ear {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Drop for Ear {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        if let Some(directory) = self.path.parent() {
            // Only the last one can.
            let _ = fs::remove_dir(directory);
        }
    }
}

#[async_trait]
impl Bell for SqliteBell {
    async fn ring(&self, message: &str) -> Result<(), StorageError> {
        const OPERATION: &str = "telling other processes";
        let found = self
            .on_directory(OPERATION, false, |directory| {
                let names = directory.names()?;
                Ok((directory, names))
            })
            .await;
        let (directory, names) = match found {
            Ok(found) => found,
            // Nobody listens.
            Err(StorageError::Backend { source, .. })
                if source
                    .downcast_ref::<io::Error>()
                    .is_some_and(|error| error.kind() == ErrorKind::NotFound) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let socket = UnixDatagram::unbound().map_err(|error| failed(OPERATION, error))?;
        for name in names {
            let address = directory.address(&name);
            let mut offers = 0;
            loop {
                match socket.try_send_to(message.as_bytes(), &address) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock && offers < OFFERS => {
                        offers += 1;
                        tokio::time::sleep(OFFER_AGAIN).await;
                    }
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                        // Its process has died. (A socket gets its name only when it can be told something.)
                        let _ = fs::remove_file(directory.entry(&name));
                        break;
                    }
                    // Gone in between, of another user, or too slow: it polls.
                    Err(error) => {
                        tracing::debug!(%error, "a process could not be told");
                        break;
                    }
                    Ok(_) => break,
                }
            }
        }
        Ok(())
    }

    async fn listen(&self) -> Result<BoxStream<'static, String>, StorageError> {
        const OPERATION: &str = "listening to other processes";
        let ear = self
            .on_directory(OPERATION, true, |directory| {
                directory.tidy()?;
                let name = hex::encode(&uuid::Uuid::new_v4().as_bytes()[..8]);
                let unfinished = format!("{UNFINISHED}{name}");
                let socket =
                    std::os::unix::net::UnixDatagram::bind(directory.address(&unfinished))?;
                socket.set_nonblocking(true)?;
                fs::rename(directory.entry(&unfinished), directory.entry(&name))?;
                Ok((socket, directory.entry(&name)))
            })
            .await;
        let (socket, path) = ear?;
        let socket = UnixDatagram::from_std(socket).map_err(|error| failed(OPERATION, error))?;
        let heard = unfold(Ear { socket, path }, |ear| async move {
            let mut buffer = vec![0; MAX_MESSAGE_BYTES];
            match ear.socket.recv(&mut buffer).await {
                Ok(length) => {
                    buffer.truncate(length);
                    Some((String::from_utf8_lossy(&buffer).into_owned(), ear))
                }
                Err(error) => {
                    tracing::debug!(%error, "the socket on which other processes were heard is broken");
                    None
                }
            }
        });
        Ok(heard.boxed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bell_in(directory: &Path) -> SqliteBell {
        let file = directory.join("threads.db");
        fs::write(&file, "").expect("writes");
        SqliteBell::new(file)
    }

    async fn hears(bell: &SqliteBell) {
        let mut ear = bell.listen().await.expect("listens");
        bell.ring("hello").await.expect("rings");
        let heard = tokio::time::timeout(Duration::from_secs(10), ear.next()).await;
        assert_eq!(heard.expect("in time").as_deref(), Some("hello"));
    }

    #[tokio::test]
    async fn the_directory_goes_with_the_last_who_listens() {
        let dir = tempfile::tempdir().expect("a directory");
        let bell = bell_in(dir.path());
        hears(&bell).await;
        let left: Vec<_> = fs::read_dir(dir.path()).expect("reads").collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[tokio::test]
    async fn the_socket_of_a_dead_process_is_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let bell = bell_in(dir.path());
        let sockets = dir.path().join("threads.db-bell");
        fs::create_dir(&sockets).expect("a directory");
        // Closed without having been removed, as by a kill.
        drop(std::os::unix::net::UnixDatagram::bind(sockets.join("dead")).expect("binds"));
        hears(&bell).await;
        assert!(!sockets.join("dead").exists());
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_path_that_is_too_long_for_an_address_is_no_hindrance() {
        let dir = tempfile::tempdir().expect("a directory");
        let deep = dir.path().join("d".repeat(120));
        fs::create_dir(&deep).expect("a directory");
        hears(&bell_in(&deep)).await;
    }

    #[tokio::test]
    async fn who_does_not_take_messages_holds_up_nobody() {
        let dir = tempfile::tempdir().expect("a directory");
        let bell = bell_in(dir.path());
        let asleep = bell.listen().await.expect("listens");
        let socket = std::os::unix::net::UnixDatagram::unbound().expect("a socket");
        socket.set_nonblocking(true).expect("is set");
        let name = fs::read_dir(dir.path().join("threads.db-bell"))
            .expect("reads")
            .next()
            .expect("a socket")
            .expect("reads")
            .path();
        while socket.send_to(b"x", &name).is_ok() {}
        let rung = tokio::time::timeout(Duration::from_secs(10), bell.ring("again")).await;
        rung.expect("in time").expect("rings");
        assert_eq!(asleep.take(1).collect::<Vec<_>>().await, ["x"]);
    }
}
