//! The system calls that nobody inside needs: a filter that the kernel keeps, for bubblewrap's `--seccomp`.
//!
//! The namespaces decide what is to be seen; this decides how much of the kernel can be asked at all, because every way into
//! it that is open is one that may have a hole. It is a short list of what is refused, as Docker's engine has one for its
//! containers: tracing others, keys of the kernel, namespaces and mounts of one's own, programs in the kernel, ways to open files
//! past their paths, sockets that no namespace holds, typing on a terminal. Everything else goes on as it is.
//!
//! It is written out in the kernel's own small language (classic BPF), because what has to be asked is simple and the rest must be
//! right: calls of another architecture, and those of the same one under other numbers (x32), are refused as a whole.

/// One instruction: code, where to go when it holds and when not, and a number.
type Instruction = (u16, u8, u8, u32);

// Of the kernel's `linux/filter.h` and `linux/seccomp.h`.
const LOAD: u16 = 0x20;
const IF_EQUAL: u16 = 0x15;
const IF_AT_LEAST: u16 = 0x35;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const ERROR: u32 = 0x0005_0000;
/// Where the number of a call stands in what is asked about, the architecture, and the arguments (their lower halves).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const fn argument(n: u32) -> u32 {
    // Both halves are eight bytes together; all architectures here have the lower one first.
    16 + 8 * n
}

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const EAFNOSUPPORT: u32 = 97;

#[cfg(target_arch = "x86_64")]
const OURS: Option<u32> = Some(0xc000_003e);
#[cfg(target_arch = "aarch64")]
const OURS: Option<u32> = Some(0xc000_00b7);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const OURS: Option<u32> = None;

/// Calls that are not permitted, with any arguments.
const REFUSED: &[libc::c_long] = &[
    // Other processes' memory and files.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    438, // pidfd_getfd
    // The kernel's keys: those of the spawner's session would be ours to read.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Programs in the kernel, its events, its queues.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    425, // io_uring_setup
    426, // io_uring_enter
    427, // io_uring_register
    libc::SYS_fanotify_init,
    // Files past their paths.
    libc::SYS_open_by_handle_at,
    // Namespaces, mounts and roots.
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    428, // open_tree
    429, // move_mount
    430, // fsopen
    431, // fsconfig
    432, // fsmount
    433, // fspick
    442, // mount_setattr
    467, // open_tree_attr
    // The machine itself.
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_quotactl,
    443, // quotactl_fd
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// Calls whose arguments cannot be looked at, because they are in memory: as if the kernel did not have them, so that programs use
/// the older ones.
const UNKNOWN: &[libc::c_long] = &[
    435, // clone3
    437, // openat2
];

/// New user, mount, PID, network, IPC, UTS, cgroup and time namespaces, as `unshare` has them. The last is a signal's number for
/// `clone`, which has no bit for it.
const NAMESPACES: u32 = 0x7e02_0000;
const TIME_NAMESPACE: u32 = 0x80;
/// Of the mode of a file: run as its owner. Outside, its owner is whoever runs the sandbox.
const SET_UID: u32 = 0o4000;
/// Of the flags of `open`: it may make a file, so that its mode counts.
const MAKES: u32 = 0o100 | 0o20_000_000;
/// Kinds of sockets that are in a namespace of networks, or are pairs: Unix, IPv4, IPv6, netlink. Others lead to the machine under
/// this one (vsock), or to parts of the kernel that are seldom looked at.
const FAMILIES: [u32; 4] = [1, 2, 10, 16];
/// Of a terminal: typing on it, and Linux's own commands for it.
const TIOCSTI: u32 = 0x5412;
const TIOCLINUX: u32 = 0x541c;

/// The filter as bubblewrap reads it; none on an architecture whose numbers are not known here.
pub(crate) fn filter() -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for (code, yes, no, k) in program(OURS?) {
        bytes.extend(code.to_ne_bytes());
        bytes.extend([yes, no]);
        bytes.extend(k.to_ne_bytes());
    }
    Some(bytes)
}

fn program(architecture: u32) -> Vec<Instruction> {
    let fails = |error: u32| (RETURN, 0, 0, ERROR | error);
    let mut program = vec![
        (LOAD, 0, 0, ARCHITECTURE),
        (IF_EQUAL, 1, 0, architecture),
        fails(ENOSYS),
        (LOAD, 0, 0, NUMBER),
    ];
    if cfg!(target_arch = "x86_64") {
        // The same calls with 32-bit addresses.
        program.extend([(IF_AT_LEAST, 0, 1, 0x4000_0000), fails(ENOSYS)]);
    }
    for (calls, error) in [(REFUSED, EPERM), (UNKNOWN, ENOSYS)] {
        for call in calls {
            program.extend([(IF_EQUAL, 0, 1, number(*call)), fails(error)]);
        }
    }
    let mut when = |call: libc::c_long, asked: &[Instruction]| {
        // Over what is asked, and over its last word, which is that the call may go on.
        let over = u8::try_from(asked.len() + 1).unwrap_or(u8::MAX);
        program.push((IF_EQUAL, 0, over, number(call)));
        program.extend(asked);
        program.push((RETURN, 0, 0, ALLOW));
    };
    let any = |n: u32, bits: u32| {
        [
            (LOAD, 0, 0, argument(n)),
            (IF_ANY_BIT, 0, 1, bits),
            fails(EPERM),
        ]
    };
    let makes = |flags: u32, mode: u32| {
        [
            (LOAD, 0, 0, argument(flags)),
            (IF_ANY_BIT, 0, 3, MAKES),
            (LOAD, 0, 0, argument(mode)),
            (IF_ANY_BIT, 0, 1, SET_UID),
            fails(EPERM),
        ]
    };
    when(libc::SYS_clone, &any(0, NAMESPACES));
    when(libc::SYS_unshare, &any(0, NAMESPACES | TIME_NAMESPACE));
    when(libc::SYS_fchmod, &any(1, SET_UID));
    when(libc::SYS_fchmodat, &any(2, SET_UID));
    when(452, &any(2, SET_UID)); // fchmodat2
    when(libc::SYS_mknodat, &any(2, SET_UID));
    when(libc::SYS_openat, &makes(2, 3));
    #[cfg(target_arch = "x86_64")]
    {
        when(libc::SYS_chmod, &any(1, SET_UID));
        when(libc::SYS_creat, &any(1, SET_UID));
        when(libc::SYS_mknod, &any(1, SET_UID));
        when(libc::SYS_open, &makes(1, 2));
    }
    when(
        libc::SYS_ioctl,
        &[
            (LOAD, 0, 0, argument(1)),
            (IF_EQUAL, 1, 0, TIOCSTI),
            (IF_EQUAL, 0, 1, TIOCLINUX),
            fails(EPERM),
        ],
    );
    let [unix, four, six, netlink] = FAMILIES;
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        when(
            call,
            &[
                (LOAD, 0, 0, argument(0)),
                (IF_EQUAL, 4, 0, unix),
                (IF_EQUAL, 3, 0, four),
                (IF_EQUAL, 2, 0, six),
                (IF_EQUAL, 1, 0, netlink),
                fails(EAFNOSUPPORT),
            ],
        );
    }
    program.push((RETURN, 0, 0, ALLOW));
    program
}

/// A call's number as the kernel compares it; one that is none is never asked for.
fn number(call: libc::c_long) -> u32 {
    u32::try_from(call).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: u32 = match OURS {
        Some(architecture) => architecture,
        None => 0,
    };

    /// What the kernel would do with a call.
    fn asked(architecture: u32, call: libc::c_long, arguments: [u32; 4]) -> u32 {
        let program = program(HERE);
        let (mut at, mut held) = (0, 0);
        loop {
            let (code, yes, no, k) = program[at];
            at += 1;
            let holds = match code {
                RETURN => return k,
                LOAD => {
                    held = match k {
                        NUMBER => number(call),
                        ARCHITECTURE => architecture,
                        other => arguments[(other as usize - 16) / 8],
                    };
                    continue;
                }
                IF_EQUAL => held == k,
                IF_AT_LEAST => held >= k,
                IF_ANY_BIT => held & k != 0,
                other => panic!("no such instruction: {other}"),
            };
            at += usize::from(if holds { yes } else { no });
        }
    }

    fn here(call: libc::c_long, arguments: [u32; 4]) -> u32 {
        asked(HERE, call, arguments)
    }

    #[test]
    fn what_is_listed_is_refused_and_ordinary_calls_go_on() {
        for call in REFUSED {
            assert_eq!(here(*call, [0; 4]), ERROR | EPERM, "{call}");
        }
        for call in UNKNOWN {
            assert_eq!(here(*call, [0; 4]), ERROR | ENOSYS, "{call}");
        }
        for call in [
            libc::SYS_read,
            libc::SYS_execve,
            libc::SYS_futex,
            libc::SYS_memfd_create,
            libc::SYS_prctl,
            libc::SYS_seccomp,
        ] {
            assert_eq!(here(call, [u32::MAX; 4]), ALLOW, "{call}");
        }
    }

    #[test]
    fn other_architectures_and_other_numbers_are_no_way_round() {
        assert_eq!(asked(HERE ^ 1, libc::SYS_read, [0; 4]), ERROR | ENOSYS);
        if cfg!(target_arch = "x86_64") {
            let ptrace = libc::SYS_ptrace | 0x4000_0000;
            assert_eq!(here(ptrace, [0; 4]), ERROR | ENOSYS);
        }
    }

    #[test]
    fn arguments_decide_where_they_have_to() {
        let (yes, no) = (ALLOW, ERROR | EPERM);
        // A thread, a process, a user namespace.
        for (call, arguments, expected) in [
            (libc::SYS_clone, [0x003d_0f00, 0, 0, 0], yes),
            (libc::SYS_clone, [17, 0, 0, 0], yes),
            (libc::SYS_clone, [0x1000_0011, 0, 0, 0], no),
            (libc::SYS_clone, [0x0002_0011, 0, 0, 0], no),
            (libc::SYS_unshare, [0x400, 0, 0, 0], yes),
            (libc::SYS_unshare, [0x80, 0, 0, 0], no),
            (libc::SYS_unshare, [0x4000_0000, 0, 0, 0], no),
            (libc::SYS_fchmod, [3, 0o2755, 0, 0], yes),
            (libc::SYS_fchmod, [3, 0o4755, 0, 0], no),
            (libc::SYS_fchmodat, [3, 0, 0o755, 0], yes),
            (libc::SYS_fchmodat, [3, 0, 0o6755, 0], no),
            // A mode counts only when a file may be made.
            (libc::SYS_openat, [3, 0, 0, 0o4755], yes),
            (libc::SYS_openat, [3, 0, 0o101, 0o644], yes),
            (libc::SYS_openat, [3, 0, 0o101, 0o4755], no),
            (libc::SYS_openat, [3, 0, 0o20_200_001, 0o4755], no),
            (libc::SYS_ioctl, [0, 0x5413, 0, 0], yes),
            (libc::SYS_ioctl, [0, 0x5412, 0, 0], no),
            (libc::SYS_ioctl, [0, 0x541c, 0, 0], no),
            (libc::SYS_socket, [1, 1, 0, 0], yes),
            (libc::SYS_socket, [16, 3, 0, 0], yes),
            (libc::SYS_socket, [40, 1, 0, 0], ERROR | EAFNOSUPPORT),
            (libc::SYS_socket, [38, 5, 0, 0], ERROR | EAFNOSUPPORT),
            (libc::SYS_socketpair, [1, 1, 0, 0], yes),
        ] {
            assert_eq!(here(call, arguments), expected, "{call} {arguments:?}");
        }
    }
}
