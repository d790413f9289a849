//! A throw-away Redis server in a folder of its own, on a UNIX socket, which writes everything to disk before it answers.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

fn process(folder: &Path) -> Child {
    Command::new("redis-server")
        .args("--port 0 --appendonly yes --appendfsync always --unixsocket redis.sock".split(' '))
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("redis-server can be started (Debian's package redis-server)")
}

pub struct Redis {
    process: Child,
    folder: tempfile::TempDir,
}

impl Redis {
    pub async fn start() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("artel-redis-")
            .tempdir()
            .unwrap();
        let redis = Self {
            process: process(folder.path()),
            folder,
        };
        redis.ready().await;
        redis
    }

    async fn ready(&self) {
        super::eventually("redis-server answers", Duration::from_secs(20), || async {
            self.answers().then_some(())
        })
        .await;
    }

    /// As by `kill -9`; it comes back with [`Redis::up`].
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Starts it again after [`Redis::kill`], with what it had stored.
    pub async fn up(&mut self) {
        self.process = process(self.folder.path());
        self.ready().await;
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    fn answers(&self) -> bool {
        let Ok(mut stream) = UnixStream::connect(self.socket()) else {
            return false;
        };
        let mut answer = [0; 7];
        stream.write_all(b"PING\r\n").is_ok()
            && stream.read_exact(&mut answer).is_ok()
            && &answer == b"+PONG\r\n"
    }

    /// For `REDIS_URL`.
    pub fn url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
