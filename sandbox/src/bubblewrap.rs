//! A job as a command line of bubblewrap.
//!
//! The arguments, the environment among them, go to bubblewrap through a file in memory: the list
//! of processes never shows them, and bubblewrap's own environment is empty, so nothing of ours is
//! in `/proc/1/environ` inside.
//!
//! Root outside is mapped to uid 1000 inside like everybody else. Such a process still counts as
//! the owner of root's files, so `/proc` (with root's sysctls), the root and `/dev` are read-only
//! mounts, and nothing of the host is there that is not on a list.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cgroup::Group;
use crate::descriptors::{CLOSE_AND_RUN, MemoryFile, highest_inheritable};
use crate::detect::{bounded_output, find};
use crate::job::LAUNCHER;
use crate::running::Prepared;
use crate::{Error, Job, Stdin, seccomp};

/// The home directory inside; private and empty.
const HOME: &str = "/home/artel";
const UID: &str = "1000";
const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin";

/// Directories of the system that are links into `/usr` on most machines, and directories of
/// their own on others.
const SYSTEM: &[&str] = &[
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/nix/store",
    "/gnu/store",
];

/// What programs need of `/etc` to start, to find their alternatives and to check certificates.
const ETC: &[&str] = &[
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/ca-certificates.conf",
    "/etc/crypto-policies",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/magic",
    "/etc/mime.types",
    "/etc/pki/ca-trust",
    "/etc/pki/tls",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/timezone",
];

const PASSWD: &str = "root:x:0:0:root:/:/usr/sbin/nologin\n\
    artel:x:1000:1000:artel:/home/artel:/bin/sh\n\
    nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\nartel:x:1000:\nnogroup:x:65534:\n";
const HOSTS: &str = "127.0.0.1 localhost sandbox\n::1 localhost\n";
const NSSWITCH: &str = "passwd: files\ngroup: files\nhosts: files\n";

/// Descriptors of the generated files of `/etc` start here, and after them comes the filter of system calls; before come
/// bubblewrap's arguments and its status.
const FIRST_DATA_FD: usize = 5;

/// The programs that confinement uses.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    bwrap: PathBuf,
    prlimit: PathBuf,
    nice: Option<PathBuf>,
    shell: PathBuf,
    shell_closes_all: bool,
    root: bool,
    counts_per_namespace: bool,
}

impl Programs {
    pub(crate) fn new(bwrap: PathBuf, prlimit: PathBuf) -> Self {
        let bash = find("bash");
        Self {
            bwrap,
            prlimit,
            nice: find("nice"),
            shell_closes_all: bash.is_some(),
            shell: bash.unwrap_or_else(|| "/bin/sh".into()),
            root: rustix::process::geteuid().is_root(),
            counts_per_namespace: kernel_is_at_least(5, 14),
        }
    }

    pub(crate) fn describe(&self) -> String {
        format!(
            "commands run confined by bubblewrap ({}): own namespaces, no network, listed mounts, limits",
            self.bwrap.display()
        )
    }

    /// Runs `true` with everything that jobs use.
    pub(crate) fn trial(&self) -> Result<(), String> {
        let mut prepared = self
            .prepare(&Job::new(["true"]))
            .map_err(|error| error.to_string())?;
        let said = bounded_output(&mut prepared.command);
        let status = prepared.status.as_mut().map(MemoryFile::read);
        if exit_code(&status.unwrap_or_default()) == Some(0) {
            return Ok(());
        }
        let said = said.trim();
        Err(if said.is_empty() {
            "a trial run of `true` did not end well and said nothing".to_owned()
        } else {
            said.to_owned()
        })
    }

    pub(crate) fn prepare(&self, job: &Job) -> Result<Prepared, Error> {
        if !self.shell_closes_all
            && let Some(fd) = highest_inheritable(9)
        {
            return Err(Error::InheritedDescriptor(fd));
        }
        let mut arguments = namespaces(job);
        let mut data = file_system(job, &mut arguments)?;
        if let Some(filter) = seccomp::filter() {
            let fd = (FIRST_DATA_FD + data.len()).to_string();
            push(&mut arguments, ["--seccomp", &fd]);
            data.push(MemoryFile::new(&filter)?);
        }
        environment(job, &mut arguments);
        let cwd = job.cwd.as_deref().unwrap_or(Path::new(HOME));
        push(&mut arguments, [OsStr::new("--chdir"), cwd.as_os_str()]);

        let mut packed = Vec::new();
        for argument in arguments {
            packed.extend(argument.into_vec());
            packed.push(0);
        }
        let status = MemoryFile::new(b"")?;
        let mut files = vec![MemoryFile::new(&packed)?];
        files.extend(data);

        // Root is not counted against a limit of resources; a control group holds for root too.
        let group = if self.root {
            Group::new(backstop(job)).ok()
        } else {
            None
        };
        let mut script = String::new();
        if let Some(group) = &group {
            let _ = write!(
                script,
                "echo $$ >{} || exit 125; ",
                group.members().display()
            );
        }
        script.push_str(CLOSE_AND_RUN);
        let _ = write!(script, " 3<{} 4>>{}", files[0].path(), status.path());
        for (index, file) in files[1..].iter().enumerate() {
            let _ = write!(script, " {}<{}", FIRST_DATA_FD + index, file.path());
        }

        let mut command = Command::new(&self.shell);
        // A group of its own: a terminal's interrupt is for us to act on.
        command.env_clear().current_dir("/").process_group(0);
        command.arg("-c").arg(script);
        command.arg("sandbox");
        if let Some(nice) = &self.nice {
            command.arg(nice).args(["-n", "5"]);
        }
        command.arg(&self.prlimit);
        command.args(outer_limits(job));
        command.arg(&self.bwrap);
        command.args(["--args", "3", "--json-status-fd", "4", "--"]);
        command.args(self.inner(job));
        let stdin = match &job.stdin {
            Stdin::Null => Stdio::null(),
            Stdin::Bytes(bytes) => Stdio::from(MemoryFile::new(bytes)?.into_file()),
        };
        command.stdin(stdin);
        Ok(Prepared {
            command,
            status: Some(status),
            files,
            private: None,
            group,
        })
    }

    /// The command with what must be set inside the namespaces: the kernel's own bound on
    /// processes, as a backstop above the watched one. It does not hold for root outside, for whom a
    /// control group does the same.
    fn inner(&self, job: &Job) -> Vec<OsString> {
        let backstop = backstop(job);
        let bounded = self.counts_per_namespace && !self.root;
        if job.launcher.is_some() {
            let limits: &[_] = if bounded { &[("nproc", backstop)] } else { &[] };
            return job.launch_args(limits, &[], Path::to_path_buf);
        }
        let mut inner = Vec::new();
        if bounded && self.prlimit.starts_with("/usr") {
            inner.push(self.prlimit.clone().into_os_string());
            inner.push(format!("--nproc={backstop}:{backstop}").into());
        }
        inner.extend(job.argv.iter().cloned());
        inner
    }
}

/// The kernel's own bound on processes: above the watched one, whose end says why.
fn backstop(job: &Job) -> u64 {
    job.limits.pids.saturating_mul(2).saturating_add(16)
}

/// Mounts, from the system's to the job's; what was generated is returned in the order of its
/// descriptors.
fn file_system(job: &Job, arguments: &mut Vec<OsString>) -> Result<Vec<MemoryFile>, Error> {
    push(arguments, ["--ro-bind", "/usr", "/usr"]);
    for system in SYSTEM.iter().map(Path::new) {
        let Ok(meta) = std::fs::symlink_metadata(system) else {
            continue;
        };
        if meta.is_symlink() {
            if let Ok(target) = std::fs::read_link(system) {
                let words = [
                    OsStr::new("--symlink"),
                    target.as_os_str(),
                    system.as_os_str(),
                ];
                push(arguments, words);
            }
        } else {
            bind(arguments, "--ro-bind", system, system);
        }
    }
    for file in etc() {
        bind(arguments, "--ro-bind-try", &file, &file);
    }
    let generated = [
        ("/etc/passwd", PASSWD),
        ("/etc/group", GROUP),
        ("/etc/hosts", HOSTS),
        ("/etc/nsswitch.conf", NSSWITCH),
    ];
    let mut data = Vec::new();
    for (index, (path, content)) in generated.into_iter().enumerate() {
        data.push(MemoryFile::new(content.as_bytes())?);
        let fd = (FIRST_DATA_FD + index).to_string();
        push(arguments, ["--perms", "0444", "--ro-bind-data", &fd, path]);
    }
    push(arguments, ["--proc", "/proc", "--dev", "/dev"]);
    let bytes = job.limits.tmp_mb.saturating_mul(1 << 20).to_string();
    for (directory, mode) in [("/tmp", "1777"), ("/dev/shm", "1777"), (HOME, "0755")] {
        let words = ["--perms", mode, "--size", &bytes, "--tmpfs", directory];
        push(arguments, words);
    }
    push(arguments, ["--symlink", "/tmp", "/var/tmp"]);
    push(arguments, ["--perms", "0755", "--dir", "/run/artel"]);
    if let Some(launcher) = &job.launcher {
        bind(
            arguments,
            "--ro-bind",
            &launcher.program,
            Path::new(LAUNCHER),
        );
    }
    for mount in &job.mounts {
        let how = if mount.writable {
            "--bind"
        } else {
            "--ro-bind"
        };
        bind(arguments, how, &mount.host, &mount.guest);
    }
    for directory in ["/proc", "/dev", "/"] {
        push(arguments, ["--remount-ro", directory]);
    }
    Ok(data)
}

fn namespaces(job: &Job) -> Vec<OsString> {
    let mut arguments = Vec::new();
    push(
        &mut arguments,
        [
            "--unshare-user",
            "--disable-userns",
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-uts",
            "--unshare-net",
            "--unshare-cgroup-try",
            "--uid",
            UID,
            "--gid",
            UID,
            "--hostname",
            "sandbox",
            "--new-session",
            "--cap-drop",
            "ALL",
        ],
    );
    if job.die_with_parent {
        push(&mut arguments, ["--die-with-parent"]);
    }
    arguments
}

fn environment(job: &Job, arguments: &mut Vec<OsString>) {
    push(arguments, ["--clearenv"]);
    let standard = [
        ("PATH", PATH),
        ("HOME", HOME),
        ("LANG", "C.UTF-8"),
        ("TMPDIR", "/tmp"),
        ("USER", "artel"),
    ];
    for (name, value) in standard {
        if !job.env.contains_key(name) {
            push(arguments, ["--setenv", name, value]);
        }
    }
    for (name, value) in &job.env {
        push(arguments, ["--setenv", name, value]);
    }
}

/// Limits that the kernel keeps for each process. Memory is a backstop far above the watched
/// bound, for the one allocation that would fill the machine between two looks.
fn outer_limits(job: &Job) -> Vec<String> {
    const MIB: u64 = 1 << 20;
    let limits = &job.limits;
    let data = limits
        .memory_mb
        .saturating_mul(4)
        .saturating_add(1024)
        .saturating_mul(MIB);
    let file = limits.file_mb.saturating_mul(MIB);
    let open = rustix::process::getrlimit(rustix::process::Resource::Nofile)
        .maximum
        .map_or(4096, |most| most.min(4096));
    let mut words = vec![
        "--core=0:0".to_owned(),
        format!("--data={data}:{data}"),
        format!("--fsize={file}:{file}"),
        format!("--nofile={open}:{open}"),
    ];
    if let Some(cpu) = limits.cpu_s {
        words.push(format!("--cpu={}:{}", cpu + 2, cpu + 4));
    }
    words
}

/// The list of `/etc`, and Python's site files, whose name carries a version.
fn etc() -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = ETC.iter().map(PathBuf::from).collect();
    if let Ok(entries) = std::fs::read_dir("/etc") {
        let python = entries.flatten().filter(|entry| {
            let name = entry.file_name();
            name.as_bytes().starts_with(b"python3")
        });
        files.extend(python.map(|entry| entry.path()));
    }
    files.retain(|file| file.exists());
    files
}

fn bind(arguments: &mut Vec<OsString>, how: &str, host: &Path, guest: &Path) {
    push(
        arguments,
        [OsStr::new(how), host.as_os_str(), guest.as_os_str()],
    );
}

fn push<I>(arguments: &mut Vec<OsString>, words: I)
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    arguments.extend(words.into_iter().map(|word| word.as_ref().to_owned()));
}

/// The exit code in bubblewrap's status, there only if the command began.
pub(crate) fn exit_code(status: &str) -> Option<i64> {
    status
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|value| value.get("exit-code")?.as_i64())
}

fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(a), Some(b)) => (a, b) >= (major, minor),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_read_from_the_status_only_when_the_command_began() {
        assert_eq!(
            exit_code("{ \"child-pid\": 12 }\n{ \"exit-code\": 3 }\n"),
            Some(3)
        );
        assert_eq!(exit_code("{ \"child-pid\": 12 }\n"), None);
        assert_eq!(exit_code(""), None);
    }

    #[test]
    fn no_argument_shows_the_environment() {
        let programs = Programs::new("/usr/bin/bwrap".into(), "/usr/bin/prlimit".into());
        let job = Job::new(["true"]).env("TOKEN", "hunter2");
        let prepared = programs.prepare(&job).expect("prepared");
        let shown = format!("{:?}", prepared.command);
        assert!(
            !shown.contains("hunter2") && !shown.contains("TOKEN"),
            "{shown}"
        );
    }
}
