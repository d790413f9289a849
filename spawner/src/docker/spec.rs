//! A worker as a container: what it sees, what it may use, whose it is.

use bollard::models::{
    ContainerCreateBody, HostConfig, HostConfigCgroupnsModeEnum, HostConfigLogConfig, MountType,
    ResourcesUlimits, RestartPolicy, RestartPolicyNameEnum,
};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

/// The beginning of every label that we set.
pub const LABEL: &str = "artel";
/// The label that says of which home a container's spawner is, without [`LABEL`] and its dot.
pub const HOME_LABEL: &str = "home";
/// The home folder inside: private, empty, and in memory, as large as `/tmp`.
pub const HOME: &str = "/home/artel";

/// The runtime whose containers have a user namespace of their own and may run Docker inside.
pub const SYSBOX: &str = "sysbox-runc";

/// Something of the host that the container sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is on the host.
    pub host: PathBuf,
    /// Where the container sees it.
    pub guest: PathBuf,
    /// Whether the container may write to it.
    pub writable: bool,
}

/// What a container may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Processors, as a number of cores.
    pub cpu: f64,
    /// Memory, swap included, in MiB.
    pub memory_mb: u64,
    /// Processes and threads.
    pub pids: u64,
    /// `/tmp`, which is memory, in MiB.
    pub tmp_mb: u64,
    /// Wall clock, in seconds; none: nobody ends it for that.
    pub wall_s: Option<u64>,
    /// A folder on the host that may grow to so many MiB.
    pub disk: Option<(PathBuf, u64)>,
    /// What it may write beside its mounts, in MiB: into its system, where that is writable, and into volumes of its image.
    pub system_mb: Option<u64>,
}

/// A container to be made.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name; unique on the engine.
    pub name: String,
    /// The image, by id.
    pub image: String,
    /// Program and arguments; the image's entry point is not used.
    pub argv: Vec<String>,
    /// Its environment; nothing is inherited but what the image sets.
    pub env: Vec<(String, String)>,
    /// Who it runs as: user and group, by number.
    pub user: (u32, u32),
    /// Where it starts.
    pub cwd: PathBuf,
    /// What it sees of the host.
    pub mounts: Vec<Mount>,
    /// What it may use.
    pub limits: Limits,
    /// Labels, without [`LABEL`] and its dot.
    pub labels: BTreeMap<String, String>,
    /// Whether it may run Docker inside: root of its own user namespace with a writable system, whoever `user` is. Its runtime
    /// is [`SYSBOX`] then, whatever the engine's connection uses.
    pub docker_inside: bool,
}

impl Spec {
    /// What the engine is asked to bound a writable system to, where its storage can, and counts so much of the image with it.
    pub(super) fn quota(&self, image_mb: u64) -> Option<HashMap<String, String>> {
        let most_mb = self.limits.system_mb.filter(|_| self.docker_inside)?;
        let most_mb = most_mb.saturating_add(image_mb);
        Some([("size".to_owned(), format!("{most_mb}m"))].into())
    }

    /// As the engine wants it. `processors` is how many the engine has: it refuses to promise more.
    pub(super) fn body(&self, runtime: &str, processors: Option<u32>) -> ContainerCreateBody {
        let (user, group) = self.user();
        let labels: HashMap<String, String> = self
            .labels
            .iter()
            .map(|(name, value)| (format!("{LABEL}.{name}"), value.clone()))
            .collect();
        ContainerCreateBody {
            image: Some(self.image.clone()),
            entrypoint: Some(Vec::new()),
            cmd: Some(self.argv.clone()),
            env: Some(
                self.env
                    .iter()
                    .map(|(name, value)| format!("{name}={value}"))
                    .collect(),
            ),
            user: Some(format!("{user}:{group}")),
            working_dir: Some(self.cwd.display().to_string()),
            labels: Some(labels),
            attach_stdin: Some(false),
            network_disabled: Some(true),
            host_config: Some(self.host_config(runtime, processors)),
            ..ContainerCreateBody::default()
        }
    }

    fn user(&self) -> (u32, u32) {
        if self.docker_inside {
            (0, 0)
        } else {
            self.user
        }
    }

    fn host_config(&self, runtime: &str, processors: Option<u32>) -> HostConfig {
        let limits = &self.limits;
        let (user, group) = self.user();
        let runtime = if self.docker_inside { SYSBOX } else { runtime };
        let cores = processors.map_or(limits.cpu, |most| limits.cpu.min(most.into()));
        let bytes = |mb: u64| i64::try_from(mb.saturating_mul(1 << 20)).unwrap_or(i64::MAX);
        let memory = bytes(limits.memory_mb);
        let tmp_bytes = bytes(limits.tmp_mb);
        let mounts = self
            .mounts
            .iter()
            .map(|mount| bollard::models::Mount {
                typ: Some(MountType::BIND),
                source: Some(mount.host.display().to_string()),
                target: Some(mount.guest.display().to_string()),
                read_only: Some(!mount.writable),
                ..bollard::models::Mount::default()
            })
            .collect();
        HostConfig {
            runtime: Some(runtime.to_owned()),
            // Only its own loopback; the way out is the broker's socket.
            network_mode: Some("none".to_owned()),
            mounts: Some(mounts),
            memory: Some(memory),
            // The same as `memory`: no swap.
            memory_swap: Some(memory),
            nano_cpus: Some(nano_cpus(cores)),
            pids_limit: Some(i64::try_from(limits.pids).unwrap_or(i64::MAX)),
            // Dies before anything of ours does.
            oom_score_adj: Some(900),
            ulimits: Some(vec![
                ulimit("nofile", 4096),
                // A core file could be as large as the memory.
                ulimit("core", 0),
            ]),
            readonly_rootfs: Some(!self.docker_inside),
            tmpfs: Some(HashMap::from([
                (
                    "/tmp".to_owned(),
                    format!("rw,nosuid,nodev,exec,mode=1777,size={tmp_bytes}"),
                ),
                (
                    HOME.to_owned(),
                    format!(
                        "rw,nosuid,nodev,exec,mode=0700,uid={user},gid={group},size={tmp_bytes}"
                    ),
                ),
            ])),
            cap_drop: (!self.docker_inside).then(|| vec!["ALL".to_owned()]),
            security_opt: Some(vec!["no-new-privileges:true".to_owned()]),
            ipc_mode: Some("private".to_owned()),
            cgroupns_mode: Some(HostConfigCgroupnsModeEnum::PRIVATE),
            privileged: Some(false),
            // What it prints is bounded on the disk as well.
            log_config: Some(HostConfigLogConfig {
                typ: Some("json-file".to_owned()),
                config: Some(HashMap::from([
                    ("max-size".to_owned(), "16m".to_owned()),
                    ("max-file".to_owned(), "2".to_owned()),
                ])),
            }),
            restart_policy: Some(RestartPolicy {
                name: Some(RestartPolicyNameEnum::NO),
                maximum_retry_count: None,
            }),
            auto_remove: Some(false),
            ..HostConfig::default()
        }
    }
}

fn ulimit(name: &str, most: i64) -> ResourcesUlimits {
    ResourcesUlimits {
        name: Some(name.to_owned()),
        soft: Some(most),
        hard: Some(most),
    }
}

/// Docker counts processors in billionths.
#[allow(clippy::cast_possible_truncation)] // bounded just before
fn nano_cpus(cores: f64) -> i64 {
    (cores * 1e9).clamp(1e7, 1e13) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        Spec {
            name: "artel-x".to_owned(),
            image: "sha256:1".to_owned(),
            argv: vec!["true".to_owned()],
            env: vec![("A".to_owned(), "b".to_owned())],
            user: (1000, 1000),
            cwd: "/workspace".into(),
            mounts: vec![Mount {
                host: "/h".into(),
                guest: "/g".into(),
                writable: false,
            }],
            limits: Limits {
                cpu: 1.5,
                memory_mb: 64,
                pids: 10,
                tmp_mb: 8,
                wall_s: None,
                disk: None,
                system_mb: None,
            },
            labels: [("task".to_owned(), "t".to_owned())].into(),
            docker_inside: false,
        }
    }

    #[test]
    fn a_worker_has_no_network_no_capability_and_a_read_only_system() {
        let body = spec().body("sysbox-runc", Some(8));
        assert_eq!(body.network_disabled, Some(true));
        assert_eq!(body.user.as_deref(), Some("1000:1000"));
        assert_eq!(body.labels.unwrap()["artel.task"], "t");
        let host = body.host_config.unwrap();
        assert_eq!(host.runtime.as_deref(), Some("sysbox-runc"));
        assert_eq!(host.network_mode.as_deref(), Some("none"));
        assert_eq!(host.cap_drop, Some(vec!["ALL".to_owned()]));
        assert_eq!(host.readonly_rootfs, Some(true));
        assert_eq!(host.privileged, Some(false));
        assert_eq!(host.memory, host.memory_swap);
        assert_eq!(host.nano_cpus, Some(1_500_000_000));
        assert_eq!(host.pids_limit, Some(10));
        assert_eq!(
            host.security_opt,
            Some(vec!["no-new-privileges:true".to_owned()])
        );
        let mount = &host.mounts.unwrap()[0];
        assert_eq!(mount.read_only, Some(true));
    }

    #[test]
    fn docker_inside_means_sysbox_and_root_of_its_namespace_and_nothing_else_is_loosened() {
        let plain = spec().body("runc", None);
        let mut spec = spec();
        spec.docker_inside = true;
        let inside = spec.body("runc", None);
        assert_eq!(inside.user.as_deref(), Some("0:0"));
        let (mut plain, mut inside) = (plain.host_config.unwrap(), inside.host_config.unwrap());
        assert_eq!(inside.runtime.as_deref(), Some(SYSBOX));
        assert_eq!(inside.readonly_rootfs, Some(false));
        assert_eq!(inside.cap_drop, None);
        assert_eq!(inside.privileged, Some(false));
        assert_eq!(inside.network_mode.as_deref(), Some("none"));
        for config in [&mut plain, &mut inside] {
            config.runtime = None;
            config.readonly_rootfs = None;
            config.cap_drop = None;
            // The home folder belongs to whoever works.
            config.tmpfs = None;
        }
        assert_eq!(plain, inside);
    }

    #[test]
    fn a_system_that_is_written_to_has_a_quota_and_another_one_needs_none() {
        let mut spec = spec();
        spec.limits.system_mb = Some(64);
        assert_eq!(spec.quota(0), None);
        spec.docker_inside = true;
        assert_eq!(spec.quota(0).unwrap()["size"], "64m");
        assert_eq!(spec.quota(36).unwrap()["size"], "100m");
        spec.limits.system_mb = None;
        assert_eq!(spec.quota(0), None);
    }

    #[test]
    fn no_more_processors_are_asked_for_than_there_are() {
        let host = spec().body("runc", Some(1)).host_config.unwrap();
        assert_eq!(host.nano_cpus, Some(1_000_000_000));
        let host = spec().body("runc", None).host_config.unwrap();
        assert_eq!(host.nano_cpus, Some(1_500_000_000));
    }
}
