//! The full size as `make up` starts it, from a copy of what it needs, on the Docker engine of the tests.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

use crate::support::docker;
use crate::support::telegram::{TOKEN, Telegram};
use crate::{OWNER, WORK};

/// What `make up` reads.
const NEEDED: [&str; 10] = [
    "Dockerfile",
    "docker-compose.docker.yml",
    "docker-compose.yml",
    "images",
    "scripts/base-image",
    "scripts/compose",
    "scripts/images",
    "scripts/need",
    "scripts/setting",
    "scripts/up",
];

/// Bound of every call of a script: images may have to be made first, on a machine that is busy.
const SCRIPT: Duration = Duration::from_mins(8);

/// A Compose project. When it is dropped, nothing of it is left.
pub struct House {
    folder: tempfile::TempDir,
    name: String,
    environment: BTreeMap<String, String>,
    /// Where containers find this machine.
    pub gateway: String,
    pub telegram: Telegram,
    /// What deployed services may have.
    pub ports: RangeInclusive<u16>,
}

/// A container as the engine sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seen {
    pub id: String,
    pub pid: u32,
    pub healthy: bool,
    pub restarts: u64,
}

impl House {
    /// Its images, its networks, and somebody who listens for the bot; nothing runs yet.
    pub async fn new() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("artel-up-")
            .tempdir()
            .unwrap();
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        std::fs::create_dir(folder.path().join("scripts")).unwrap();
        for needed in NEEDED {
            let copied = std::process::Command::new("cp")
                .arg("-r")
                .args([root.join(needed), folder.path().join(needed)])
                .status();
            assert!(copied.unwrap().success(), "{needed}");
        }
        let name = folder.path().file_name().unwrap().to_string_lossy();
        // What Compose takes as the name of a project.
        let name = name.to_lowercase().replace(['-', '.', '_'], "");
        let ports = free_ports();
        // No other test deploys there, so nobody else ever answers at a port that was given up.
        let low = 30_000 + u16::try_from(std::process::id() % 27).unwrap() * 100;
        let mut environment: BTreeMap<String, String> = [
            ("COMPOSE_PROJECT_NAME", name.clone()),
            ("DOCKER_HOST", docker::host()),
            ("POSTGRES_PORT", ports[0].to_string()),
            ("REDIS_PORT", ports[1].to_string()),
            ("SCHEDULER_HTTP_PORT", ports[2].to_string()),
            ("ARTEL_PORTS", format!("{low}-{}", low + 99)),
            ("ARTEL_TAPE", "demo".to_owned()),
            ("TELEGRAM_BOT_TOKEN", TOKEN.to_owned()),
            ("ALLOWED_USERS", OWNER.to_string()),
            ("ADMIN_CHAT_IDS", OWNER.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        // What is tried is what is made here, wherever the tests run.
        environment.insert("REGISTRY".to_owned(), "none".to_owned());
        for name in ["PATH", "HOME", "BASE_TAR", "BASE_IMAGE", "DOCKER_CONFIG"] {
            if let Ok(value) = std::env::var(name) {
                environment.insert(name.to_owned(), value);
            }
        }
        let mut house = Self {
            folder,
            name,
            environment,
            // Both are replaced as soon as there are networks.
            gateway: String::new(),
            telegram: Telegram::start().await,
            ports: low..=low + 99,
        };
        house.images().await;
        // With the first container there is a network.
        house.script("up", &["--only-secrets"]).await;
        house
            .script("compose", &["up", "--no-start", "postgres"])
            .await;
        let network = format!("{}_data", house.name);
        let gateway = docker::docker(&[
            "network",
            "inspect",
            "-f",
            "{{(index .IPAM.Config 0).Gateway}}",
            &network,
        ]);
        gateway.trim().clone_into(&mut house.gateway);
        house.telegram = Telegram::start_on(&house.gateway).await;
        house.set("TELEGRAM_API_URL", &house.telegram.url.clone());
        house
    }

    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.insert(name.to_owned(), value.to_owned());
    }

    /// The images with the programs of this build, made once for each build and engine.
    async fn images(&mut self) {
        let program = Path::new(env!("CARGO_BIN_EXE_artel"));
        let built = std::fs::metadata(program).unwrap().modified().unwrap();
        let built = built.duration_since(std::time::UNIX_EPOCH).unwrap();
        let tag = format!("test-{}", built.as_nanos());
        self.set("IMAGE_TAG", &tag);
        let lock = std::env::temp_dir().join("artel-test-up.lock");
        let alone = std::fs::File::create(lock).unwrap();
        let alone = tokio::task::spawn_blocking(move || alone.lock().map(|()| alone));
        let _alone = tokio::time::timeout(SCRIPT, alone)
            .await
            .expect("whoever makes the images is done within its bound")
            .unwrap()
            .unwrap();
        let ours = [format!("artel:{tag}"), format!("artel-spawner:{tag}")];
        let is_made = |image: &String| !docker::docker(&["image", "ls", "-q", image]).is_empty();
        if !ours.iter().all(is_made) {
            self.make_images().await;
        }
        // What has a name is not built again.
        self.set("ARTEL_IMAGE", &ours[0]);
        self.set("SPAWNER_IMAGE", &ours[1]);
    }

    async fn make_images(&mut self) {
        let programs = self.folder.path().join("programs");
        std::fs::create_dir(&programs).unwrap();
        for (name, program) in [
            ("artel", env!("CARGO_BIN_EXE_artel")),
            ("spawner", env!("CARGO_BIN_EXE_spawner")),
        ] {
            // What a debugger wants is most of it. The same time makes the same layer.
            let stripped = std::process::Command::new("strip")
                .args(["-p", "-o"])
                .arg(programs.join(name))
                .arg(program)
                .status();
            assert!(stripped.unwrap().success(), "strip of binutils works");
        }
        self.set("PROGRAMS", &programs.display().to_string());
        self.script("images", &[]).await;
        std::fs::remove_dir_all(&programs).unwrap();
    }

    fn command(&self, script: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.folder.path().join("scripts").join(script));
        command
            .args(arguments)
            .env_clear()
            .envs(&self.environment)
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn output(&self, script: &str, arguments: &[&str]) -> Output {
        let running = self.command(script, arguments).output();
        tokio::time::timeout(SCRIPT, running)
            .await
            .unwrap_or_else(|_| panic!("scripts/{script} {arguments:?}: not within {SCRIPT:?}"))
            .unwrap()
    }

    /// Runs a script of the project, which succeeds; gives what it printed.
    pub async fn script(&self, script: &str, arguments: &[&str]) -> String {
        let output = self.output(script, arguments).await;
        let said = String::from_utf8_lossy(&output.stderr);
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "scripts/{script} {arguments:?}: {said}\n{stdout}"
        );
        stdout
    }

    /// The lines that `artel` prints in the container of a runner; none while there is no runner, or no answer.
    async fn artel(&self, arguments: &[&str]) -> Option<Vec<Value>> {
        let mut all = vec!["exec", "-T", "runner", "artel"];
        all.extend(arguments);
        let output = self.output("compose", &all).await;
        let text = String::from_utf8_lossy(&output.stdout);
        let lines = text.lines().map(|line| serde_json::from_str(line).ok());
        lines
            .collect::<Option<Vec<Value>>>()
            .filter(|lines| output.status.success() && !lines.is_empty())
    }

    /// The record of a project.
    pub async fn status(&self, project: &str) -> Option<Value> {
        self.artel(&["status", project, "--json"]).await?.pop()
    }

    /// The events of a project.
    pub async fn events(&self, project: &str) -> Option<Vec<Value>> {
        self.artel(&["logs", project, "--json", "-n", "2000"]).await
    }

    /// Every container of the project, by its service.
    pub fn seen(&self) -> BTreeMap<String, Seen> {
        let mut inspect = vec!["inspect"];
        let all = self.of_project(&["ps", "-aq"]);
        inspect.extend(all.lines());
        let all: Value = serde_json::from_str(&docker::docker(&inspect)).unwrap_or_default();
        let mut seen = BTreeMap::new();
        for container in all.as_array().into_iter().flatten() {
            let service = &container["Config"]["Labels"]["com.docker.compose.service"];
            let state = &container["State"];
            let about = Seen {
                id: container["Id"].as_str().unwrap().to_owned(),
                pid: u32::try_from(state["Pid"].as_u64().unwrap()).unwrap(),
                healthy: state["Status"] == "running" && state["Health"]["Status"] == "healthy",
                restarts: container["RestartCount"].as_u64().unwrap(),
            };
            seen.insert(service.as_str().unwrap().to_owned(), about);
        }
        seen
    }

    /// What the engine lists, of this project.
    pub fn of_project(&self, list: &[&str]) -> String {
        let filter = format!("label=com.docker.compose.project={}", self.name);
        let mut all = list.to_vec();
        all.extend(["--filter", &filter]);
        docker::docker(&all)
    }

    /// What the engine says about the containers of services.
    pub fn about(&self, services: &[&str]) -> String {
        let ids = self.ids(services);
        let mut inspect = vec!["inspect"];
        inspect.extend(ids.iter().map(String::as_str));
        let about = docker::docker(&inspect);
        assert!(about.contains("/run/secrets/"), "{about}");
        about
    }

    fn ids(&self, services: &[&str]) -> Vec<String> {
        let mut seen = self.seen();
        let id = |service: &&str| seen.remove(*service).expect("it is there").id;
        services.iter().map(id).collect()
    }

    /// Environment and arguments of every process of services.
    pub fn processes(&self, services: &[&str]) -> String {
        Self::processes_of(&self.ids(services))
    }

    /// The same, of containers.
    pub fn processes_of(containers: &[String]) -> String {
        // Some of them may end meanwhile.
        let read = "for id; do grep -ls $id /proc/[0-9]*/cgroup; done |
            while read -r file; do at=${file%/cgroup}; cat $at/environ $at/cmdline 2>/dev/null | tr '\\0' '\\n'; done";
        let image = docker::small_image();
        let mut look = vec![
            "run",
            "--rm",
            "--network=none",
            "--pid=host",
            "--cap-add=SYS_PTRACE",
        ];
        look.extend([image.as_str(), "sh", "-c", read, "sh"]);
        look.extend(containers.iter().map(String::as_str));
        let read = docker::docker(&look);
        assert!(read.contains("PATH="), "{containers:?}: {read}");
        read
    }

    /// Secrets are files: neither what the engine says about containers nor what their processes were started with shows one.
    pub fn shows_no_secret(&self, about: &str, processes: &str) {
        for file in std::fs::read_dir(self.folder.path().join(".secrets")).unwrap() {
            let name = file.unwrap().file_name().to_string_lossy().into_owned();
            let secret = self.secret(&name);
            assert!(secret.is_empty() || secret.len() > 20, "{name}");
            let shown = |text: &str| !secret.is_empty() && text.contains(&secret);
            assert!(!shown(about), "{name} is in what the engine says");
            assert!(!shown(processes), "{name} is in a process");
        }
    }

    /// Workers get containers of their own, and data a folder of this machine, which is returned.
    pub fn workers_in(&mut self, runtime: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let data = self.folder.path().join("data");
        // Root of a user namespace has to pass through.
        let pass = std::fs::Permissions::from_mode(0o711);
        std::fs::set_permissions(self.folder.path(), pass).unwrap();
        self.set("SPAWNER_RUNTIME", runtime);
        self.set("WORKER_IMAGE", &docker::worker_image());
        self.set("ARTEL_DATA", &data.display().to_string());
        data
    }

    /// What stands in a file of `.secrets`.
    pub fn secret(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(".secrets").join(name)).unwrap()
    }

    /// Kills everything in the container of a service that is well, as nobody who wanted it to stop would. Gives what it was.
    pub async fn kill(&self, service: &str) -> Seen {
        let before = self.well(service, |_| true).await;
        // The engine takes `docker kill` for a wish that it stay away; a crash comes from outside.
        let killed = docker::docker(&[
            "run",
            "--rm",
            "--network=none",
            "--pid=host",
            &docker::small_image(),
            "sh",
            "-c",
            &format!("kill -9 {} && echo killed", before.pid),
        ]);
        assert_eq!(killed.trim(), "killed", "{service}: {before:?}");
        before
    }

    /// Waits until the engine has started a service again by itself, and it is well.
    pub async fn is_back(&self, service: &str, before: &Seen) {
        self.well(service, |now| {
            now.id == before.id && now.restarts > before.restarts
        })
        .await;
    }

    /// Waits until a service is well, and as it should be.
    async fn well(&self, service: &str, fits: impl Fn(&Seen) -> bool) -> Seen {
        crate::support::eventually(&format!("{service} is well"), WORK, || async {
            // Docker's client is not asked without a break.
            tokio::time::sleep(Duration::from_millis(500)).await;
            let now = self.seen().remove(service)?;
            (now.healthy && fits(&now)).then_some(now)
        })
        .await
    }
}

impl Drop for House {
    fn drop(&mut self) {
        let compose = |arguments: &[&str]| {
            std::process::Command::new(self.folder.path().join("scripts/compose"))
                .args(arguments)
                .env_clear()
                .envs(&self.environment)
                .output()
        };
        if std::thread::panicking()
            && let Ok(said) = compose(&["logs", "--no-color", "--tail=60"])
        {
            eprintln!("{}", String::from_utf8_lossy(&said.stdout));
        }
        let _ = compose(&["down", "--volumes", "--timeout", "1"]);
        // What is there belongs to whom everybody works as.
        if let Some(data) = self.environment.get("ARTEL_DATA") {
            let mount = format!("{data}:/data");
            let image = docker::small_image();
            let remove = ["-c", "find /data -mindepth 1 -delete"];
            let mut run = vec![
                "run",
                "--rm",
                "--network=none",
                "--volume",
                &mount,
                &image,
                "sh",
            ];
            run.extend(remove);
            docker::docker(&run);
        }
    }
}

/// Three ports of loopback that nobody has and that the kernel gives to nobody by itself.
fn free_ports() -> [u16; 3] {
    let start = 10_000 + u16::try_from(std::process::id() % 900).unwrap() * 10;
    let mut free = (start..20_000).filter(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    std::array::from_fn(|_| free.next().expect("there are free ports"))
}
