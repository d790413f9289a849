//! Docker engines: the one that the tests share (`scripts/with-docker` starts it), and one of a test's own, which may be killed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The program that goes into the image.
const PROGRAM: &str = env!("CARGO_BIN_EXE_artel");

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set; run the tests through scripts/test, which starts what they need")
    })
}

/// An engine with an image for workers.
pub struct Engine {
    pub host: String,
    pub image: String,
    own: Option<Own>,
}

/// A daemon of our own, in a folder of its own.
struct Own {
    folder: tempfile::TempDir,
    daemon: Child,
    /// As where systemd starts both: it is not the daemon's child, and does not go with it.
    containerd: Child,
}

impl Engine {
    /// The one that all tests share.
    pub fn shared() -> Self {
        let host = variable("ARTEL_TEST_DOCKER_HOST");
        let image = image(&host);
        Self {
            host,
            image,
            own: None,
        }
    }

    /// One that may be killed. `live_restore`: whether its containers are to outlive it.
    pub async fn own(live_restore: bool) -> Self {
        let from = Self::shared();
        let folder = tempfile::Builder::new()
            .prefix("artel-engine-")
            .tempdir()
            .unwrap();
        let configuration = format!(
            r#"{{"live-restore": {live_restore}, "bridge": "none", "iptables": false, "ip6tables": false, "ip-forward": false, "ip-masq": false}}"#
        );
        std::fs::write(folder.path().join("daemon.json"), configuration).unwrap();
        let containerd = containerd(folder.path());
        let address = folder.path().join("containerd.sock");
        crate::support::eventually("containerd answers", crate::SOON, || async {
            std::os::unix::net::UnixStream::connect(&address).ok()
        })
        .await;
        let engine = Self {
            host: format!("unix://{}/docker.sock", folder.path().display()),
            image: from.image.clone(),
            own: Some(Own {
                daemon: daemon(folder.path()),
                containerd,
                folder,
            }),
        };
        engine.ready().await;
        let mut save = Command::new("docker")
            .env("DOCKER_HOST", &from.host)
            .args(["save", &from.image])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let load = Command::new("docker")
            .env("DOCKER_HOST", &engine.host)
            .arg("load")
            .stdin(save.stdout.take().unwrap())
            .output()
            .unwrap();
        assert!(load.status.success(), "{load:?}");
        assert!(save.wait().unwrap().success());
        engine
    }

    async fn ready(&self) {
        crate::support::eventually("dockerd answers", crate::SOON, || async {
            let version = Command::new("docker")
                .env("DOCKER_HOST", &self.host)
                .arg("version")
                .output()
                .unwrap();
            version.status.success().then_some(())
        })
        .await;
    }

    /// `kill -9` of the daemon; what it has started is left as it is.
    pub fn kill(&mut self) {
        let own = self.own.as_mut().expect("only our own is killed");
        own.daemon.kill().unwrap();
        own.daemon.wait().unwrap();
    }

    pub async fn up(&mut self) {
        let own = self.own.as_mut().expect("only our own is killed");
        // It would be taken for the file of a daemon that lives, should another process have its number by now.
        let _ = std::fs::remove_file(own.folder.path().join("pid"));
        own.daemon = daemon(own.folder.path());
        self.ready().await;
    }

    /// Docker's own client, and what it said.
    pub fn docker(&self, args: &[&str]) -> std::process::Output {
        Command::new("docker")
            .env("DOCKER_HOST", &self.host)
            .args(args)
            .output()
            .unwrap()
    }

    fn listed(&self, args: &[&str]) -> Vec<String> {
        let output = self.docker(args);
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// All containers that see something of a home.
    pub fn of_home(&self, home: &Path) -> Vec<String> {
        let all = self.listed(&["ps", "-aq", "--filter", "label=artel.spawner"]);
        let sees = |id: &String| {
            let about = self.docker(&["inspect", "-f", "{{json .HostConfig.Mounts}}", id]);
            String::from_utf8_lossy(&about.stdout).contains(&*home.to_string_lossy())
        };
        all.into_iter().filter(sees).collect()
    }

    /// Those of them that have ever had work, or have some: all but those that were made to wait and are not taken.
    pub fn used(&self, home: &Path) -> Vec<String> {
        self.with_work(home, &["ps", "-a"], |_| true)
    }

    /// Those in which an agent works now.
    pub fn working(&self, home: &Path) -> Vec<String> {
        self.with_work(home, &["ps"], |part| part != "refresh")
    }

    fn with_work(&self, home: &Path, list: &[&str], part: impl Fn(&str) -> bool) -> Vec<String> {
        let ours = self.of_home(home);
        let format = "{{.ID}} {{.Label \"artel.part\"}} {{.Label \"artel.slot\"}}";
        let lines = self.listed(&[list, &["--format", format]].concat());
        let has_work = |line: &String| {
            let mut words = line.split(' ');
            let (id, of, slot) = (words.next()?, words.next()?, words.next()?);
            let waits = of == "pool" && !home.join("pool").join(slot).join("taken").exists();
            let is_ours = ours.iter().any(|our| our == id);
            (is_ours && !waits && part(of)).then(|| id.to_owned())
        };
        lines.iter().filter_map(has_work).collect()
    }
}

fn log(folder: &Path, name: &str) -> std::fs::File {
    let mut options = std::fs::File::options();
    let log = options.create(true).append(true).open(folder.join(name));
    log.unwrap()
}

fn containerd(folder: &Path) -> Child {
    let at = |name: &str| folder.join(name).display().to_string();
    let configuration = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
        at("containerd/root"),
        at("containerd/state"),
        at("containerd.sock"),
    );
    std::fs::write(folder.join("containerd.toml"), configuration).unwrap();
    Command::new("containerd")
        .args(["--config", &at("containerd.toml")])
        .stdin(Stdio::null())
        .stdout(log(folder, "containerd.log"))
        .stderr(log(folder, "containerd.log"))
        .spawn()
        .expect("containerd can be started (Debian's package containerd, as root)")
}

fn daemon(folder: &Path) -> Child {
    let at = |name: &str| folder.join(name).display().to_string();
    Command::new("dockerd")
        .args([
            "--config-file",
            &at("daemon.json"),
            "--data-root",
            &at("data"),
        ])
        .args(["--exec-root", &at("exec"), "--pidfile", &at("pid")])
        .args(["--host", &format!("unix://{}", at("docker.sock"))])
        .args(["--containerd", &at("containerd.sock")])
        .stdin(Stdio::null())
        .stdout(log(folder, "log"))
        .stderr(log(folder, "log"))
        .spawn()
        .expect("dockerd can be started (Debian's package docker.io, as root)")
}

impl Drop for Own {
    #[expect(
        clippy::disallowed_methods,
        reason = "a destructor cannot wait in another way, and nothing else runs any more"
    )]
    fn drop(&mut self) {
        let folder = self.folder.path();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
            let last: Vec<_> = log.lines().rev().take(30).collect();
            eprintln!("the end of what dockerd logged, newest first: {last:#?}");
        }
        // The engine ends its containers; what it cannot end any more is ended by its number.
        signal("-TERM", &self.daemon.id().to_string());
        let until = Instant::now() + Duration::from_secs(30);
        while self.daemon.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = self.containerd.kill();
        let _ = self.containerd.wait();
        for process in shims(folder) {
            signal("-KILL", &process);
        }
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
        let mut mounts: Vec<_> = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .filter(|mount| Path::new(mount).starts_with(folder))
            .collect();
        mounts.sort_unstable();
        for mount in mounts.into_iter().rev() {
            let _ = Command::new("umount").args(["-l", mount]).status();
        }
    }
}

fn signal(signal: &str, process: &str) {
    let _ = Command::new("kill")
        .args([signal, process])
        .stderr(Stdio::null())
        .status();
}

/// The shims of containerd that are still there: processes whose command line names the folder.
fn shims(folder: &Path) -> Vec<String> {
    let folder = folder.display().to_string();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let named = processes.filter_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let process = entry.file_name().into_string().ok()?;
        let line = String::from_utf8_lossy(&line);
        // What was made and never begun has no name of its own, but a system that lies in the folder.
        let begins_never = line.starts_with("runc\0init")
            && std::fs::read_to_string(entry.path().join("mountinfo"))
                .is_ok_and(|mounts| mounts.contains(&folder));
        let is_ours = begins_never || line.contains(&folder);
        (is_ours && process.parse::<u32>().is_ok()).then_some(process)
    });
    named.collect()
}

/// The tests' image with our program where workers' images have it; made once for every build of the program.
fn image(host: &str) -> String {
    let built = std::fs::metadata(PROGRAM).unwrap().modified().unwrap();
    let built = built.duration_since(std::time::UNIX_EPOCH).unwrap();
    let name = format!("artel-test-with-artel:{}", built.as_nanos());
    let alone = std::fs::File::create(std::env::temp_dir().join("artel-test-image.lock")).unwrap();
    alone.lock().unwrap();
    let docker = |args: &[&str]| {
        let output = Command::new("docker")
            .env("DOCKER_HOST", host)
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "docker {args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    if !docker(&["image", "ls", "-q", &name]).is_empty() {
        return name;
    }
    let layer = tempfile::tempdir().unwrap();
    let program: PathBuf = layer.path().join("usr/local/bin/artel-inside");
    std::fs::create_dir_all(program.parent().unwrap()).unwrap();
    // What a debugger wants would be most of the image.
    let stripped = Command::new("strip")
        .arg("-o")
        .arg(&program)
        .arg(PROGRAM)
        .status();
    if !stripped.is_ok_and(|status| status.success()) {
        std::fs::copy(PROGRAM, &program).unwrap();
    }
    let container = docker(&["create", &variable("ARTEL_TEST_IMAGE"), "true"]);
    docker(&[
        "cp",
        &format!("{}/usr", layer.path().display()),
        &format!("{container}:/"),
    ]);
    docker(&["commit", &container, &name]);
    docker(&["rm", &container]);
    name
}
