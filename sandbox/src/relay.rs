//! Copies bytes between a loopback TCP port and a Unix socket: the only way in and out of a
//! sandbox. It knows nothing of what it carries.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// Connections at once; the next one waits in the listener's own queue.
pub const CONNECTIONS: usize = 256;
/// How long a connection to the other side may take.
const CONNECT: Duration = Duration::from_secs(10);

/// A way out, ready to serve.
pub struct Outbound {
    listener: TcpListener,
    socket: PathBuf,
}

/// A way in, ready to serve.
pub struct Inbound {
    listener: UnixListener,
    to: SocketAddr,
}

/// Listens on a loopback address; every connection goes to the Unix socket.
pub async fn outbound(listen: SocketAddr, socket: impl Into<PathBuf>) -> io::Result<Outbound> {
    if !listen.ip().is_loopback() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{listen} is no loopback address"),
        ));
    }
    Ok(Outbound {
        listener: TcpListener::bind(listen).await?,
        socket: socket.into(),
    })
}

/// Listens on a Unix socket, replacing a left-over file; every connection goes to the address.
pub fn inbound(socket: impl AsRef<Path>, to: SocketAddr) -> io::Result<Inbound> {
    Ok(Inbound {
        listener: listen(socket.as_ref())?,
        to,
    })
}

impl Outbound {
    /// The address that it listens on.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Carries connections until it is dropped.
    pub async fn serve(self) {
        self.serve_guarded(()).await;
    }

    /// The same; every connection holds a copy of the guard as long as it lasts.
    pub(crate) async fn serve_guarded<G: Clone + Send + 'static>(self, guard: G) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let (socket, guard) = (self.socket.clone(), guard.clone());
                    tokio::spawn(async move {
                        if let Ok(Ok(other)) = tokio::time::timeout(CONNECT, connect(&socket)).await
                        {
                            carry(stream, other).await;
                        }
                        drop((place, guard));
                    });
                }
                Err(error) => pause(&error).await,
            }
        }
    }
}

impl Inbound {
    /// Carries connections until it is dropped.
    pub async fn serve(self) {
        self.serve_guarded(()).await;
    }

    /// The same; every connection holds a copy of the guard as long as it lasts.
    pub(crate) async fn serve_guarded<G: Clone + Send + 'static>(self, guard: G) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let (to, guard) = (self.to, guard.clone());
                    tokio::spawn(async move {
                        let connecting = TcpStream::connect(to);
                        if let Ok(Ok(other)) = tokio::time::timeout(CONNECT, connecting).await {
                            carry(other, stream).await;
                        }
                        drop((place, guard));
                    });
                }
                Err(error) => pause(&error).await,
            }
        }
    }
}

/// Copies both ways until both sides are done.
pub async fn carry<B>(tcp: TcpStream, mut other: B)
where
    B: AsyncRead + AsyncWrite + Unpin,
{
    let mut tcp = tcp;
    let _ = tcp.set_nodelay(true);
    // A side that breaks off is ordinary: the other one sees its connection end.
    let _ = copy_bidirectional(&mut tcp, &mut other).await;
}

/// Connects to a Unix socket, whatever the length of its path. A sandbox may have put something
/// else in its place: a link is not followed, so it cannot lead us to a socket of the host.
pub async fn connect(socket: &Path) -> io::Result<UnixStream> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(socket, flags, Mode::empty())?;
    let mode = rustix::fs::fstat(&opened)?.st_mode;
    if rustix::fs::FileType::from_raw_mode(mode) != rustix::fs::FileType::Socket {
        let message = format!("{} is no socket", socket.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let path = Path::new("/proc/self/fd").join(opened.as_raw_fd().to_string());
    UnixStream::connect(path).await
}

/// Listens on a Unix socket, whatever the length of its path, replacing a left-over file. Only we
/// may connect to it.
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let short = Short::of(socket)?;
    let listener = UnixListener::bind(&short.path)?;
    let only_us = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(socket, only_us)?;
    Ok(listener)
}

/// A socket's address holds some hundred bytes; a path through an open directory is short.
struct Short {
    path: PathBuf,
    _directory: OwnedFd,
}

impl Short {
    fn of(socket: &Path) -> io::Result<Self> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "no path of a socket");
        let name = socket.file_name().ok_or_else(invalid)?;
        let parent = socket.parent().ok_or_else(invalid)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(parent, flags, Mode::empty())?;
        let path = Path::new("/proc/self/fd")
            .join(directory.as_raw_fd().to_string())
            .join(name);
        Ok(Self {
            path,
            _directory: directory,
        })
    }
}

/// A refused accept (too many open files) passes; asking again at once would only burn time.
async fn pause(error: &io::Error) {
    tracing::warn!(%error, "a relay could not take a connection; trying again");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn bytes_go_out_through_a_socket_and_in_again() {
        let directory = tempfile::tempdir().expect("directory");
        // Longer than an address holds.
        let deep = directory.path().join("d".repeat(120));
        std::fs::create_dir(&deep).expect("directory");
        let socket = deep.join("in.sock");
        let echo = TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let to = echo.local_addr().expect("address");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = echo.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut into) = stream.split();
                    tokio::io::copy(&mut from, &mut into).await
                });
            }
        });
        tokio::spawn(inbound(&socket, to).expect("inbound").serve());
        let listen = "127.0.0.1:0".parse().expect("address");
        let out = outbound(listen, &socket).await.expect("outbound");
        let address = out.address().expect("address");
        tokio::spawn(out.serve());

        for _ in 0..3 {
            let mut stream = TcpStream::connect(address).await.expect("connected");
            stream.write_all(b"hello").await.expect("sent");
            stream.shutdown().await.expect("shut");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("read");
            assert_eq!(answer, "hello");
        }
    }

    #[tokio::test]
    async fn a_link_in_the_place_of_a_socket_is_not_followed() {
        let directory = tempfile::tempdir().expect("directory");
        let real = directory.path().join("real.sock");
        let _listener = listen(&real).expect("listener");
        connect(&real).await.expect("the real one can be reached");
        let link = directory.path().join("in.sock");
        std::os::unix::fs::symlink(&real, &link).expect("link");
        assert!(connect(&link).await.is_err());
    }

    #[tokio::test]
    async fn only_loopback_can_be_listened_on() {
        let everywhere = "0.0.0.0:0".parse().expect("address");
        assert!(outbound(everywhere, "/nowhere.sock").await.is_err());
    }
}
