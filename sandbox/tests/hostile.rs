//! Commands that misbehave: each one ends within its bounds and leaves nothing behind.

use std::time::{Duration, Instant};

use sandbox::{Ended, Job, Limits, Reason, Sandbox};

fn sandbox() -> Sandbox {
    Sandbox::detect().expect("bubblewrap works here")
}

fn shell(script: &str) -> Job {
    Job::new(["sh", "-c", script])
}

fn within(wall_s: u64) -> Limits {
    Limits {
        wall_s: Some(wall_s),
        ..Limits::default()
    }
}

async fn ended(job: Job) -> Ended {
    sandbox().run(&job).await.expect("ran").ended
}

/// Whether some process has this word among its arguments.
fn runs(word: &str) -> bool {
    let entries = std::fs::read_dir("/proc").expect("proc");
    entries.flatten().any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0)
            .any(|argument| argument == word.as_bytes())
    })
}

async fn gone(word: &str) -> bool {
    let until = Instant::now() + Duration::from_mins(1);
    while runs(word) {
        if Instant::now() > until {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    true
}

#[tokio::test]
async fn a_fork_bomb_is_ended() {
    let limits = Limits {
        pids: 40,
        ..within(20)
    };
    let ended = ended(shell("b() { b | b & }; b; sleep 60").limits(limits)).await;
    assert_eq!(ended.reason, Reason::Pids);
    assert!(ended.wall_s < 10.0, "{ended:?}");
}

#[tokio::test]
async fn a_memory_bomb_is_ended() {
    let limits = Limits {
        memory_mb: 100,
        ..within(20)
    };
    let script = "x = []\nwhile True: x.append(bytearray(1 << 20))";
    let ended = ended(Job::new(["python3", "-c", script]).limits(limits)).await;
    assert_eq!(ended.reason, Reason::Memory);
    assert!(ended.peak_memory_mb >= 100, "{ended:?}");
}

#[tokio::test]
async fn one_huge_allocation_fails_by_itself() {
    let limits = Limits {
        memory_mb: 100,
        ..within(20)
    };
    let script = "x = bytearray(64 << 30)";
    let output = sandbox()
        .run(&Job::new(["python3", "-c", script]).limits(limits))
        .await
        .expect("ran");
    assert_eq!(output.ended.reason, Reason::Exited(1));
    assert!(output.tail.contains("MemoryError"), "{}", output.tail);
}

#[tokio::test]
async fn many_small_processes_share_one_memory_limit() {
    let limits = Limits {
        memory_mb: 150,
        ..within(20)
    };
    let script = "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        x = bytearray(os.urandom(1 << 20) * 40); time.sleep(60)\ntime.sleep(60)";
    let ended = ended(Job::new(["python3", "-c", script]).limits(limits)).await;
    assert_eq!(ended.reason, Reason::Memory);
}

#[tokio::test]
async fn endless_output_is_bounded_and_ended() {
    let limits = Limits {
        output_mb: 1,
        ..within(5)
    };
    let mut running = sandbox()
        .spawn(&Job::new(["yes"]).limits(limits))
        .expect("started");
    let mut bytes = 0;
    let mut last = String::new();
    while let Some(line) = running.next_line().await {
        bytes += line.text.len() + 1;
        if !line.text.is_empty() {
            last = line.text;
        }
    }
    assert!(bytes < (1 << 20) + 1000, "{bytes}");
    assert!(last.contains("the rest was dropped"), "{last}");
    assert_eq!(running.wait().await.expect("ended").reason, Reason::Wall);
}

#[tokio::test]
async fn output_that_nobody_reads_does_not_block_the_end() {
    let limits = within(20);
    let ended = ended(shell("yes | head -c 5000000; exit 4").limits(limits)).await;
    assert_eq!(ended.reason, Reason::Exited(4));
}

#[tokio::test]
async fn sleeping_for_ever_is_ended_by_the_clock() {
    let ended = ended(shell("while :; do echo .; sleep 0.1; done").limits(within(1))).await;
    assert_eq!(ended.reason, Reason::Wall);
    assert!(ended.wall_s < 30.0, "{ended:?}");
}

#[tokio::test]
async fn silence_is_ended() {
    let limits = Limits {
        idle_s: Some(1),
        ..within(50)
    };
    let ended = ended(shell("echo hello; sleep 60").limits(limits)).await;
    assert_eq!(ended.reason, Reason::Idle);
    assert!(ended.wall_s < 30.0, "{ended:?}");
}

#[tokio::test]
async fn burning_cpu_is_ended() {
    let limits = Limits {
        cpu_s: Some(1),
        ..within(30)
    };
    let ended = ended(shell("while :; do :; done").limits(limits)).await;
    assert_eq!(ended.reason, Reason::Cpu);
}

#[tokio::test]
async fn a_file_cannot_grow_over_its_limit() {
    let directory = tempfile::tempdir().expect("directory");
    let limits = Limits {
        file_mb: 1,
        ..within(20)
    };
    let job =
        shell("head -c 3000000 /dev/zero >/out/f; ls -l /out").mount_rw(directory.path(), "/out");
    ended(job.limits(limits)).await;
    let size = std::fs::metadata(directory.path().join("f"))
        .expect("there")
        .len();
    assert_eq!(size, 1 << 20);
}

#[tokio::test]
async fn filling_the_disk_with_many_files_is_ended() {
    let directory = tempfile::tempdir().expect("directory");
    let limits = Limits {
        disk_mb: Some(4),
        ..within(30)
    };
    let script = "for i in 1 2 3 4 5 6 7 8; do head -c 1000000 /dev/zero >/out/$i; done; sleep 60";
    let job = shell(script)
        .mount_rw(directory.path(), "/out")
        .limits(limits);
    assert_eq!(ended(job).await.reason, Reason::Disk);
}

#[tokio::test]
async fn what_ignores_the_request_is_killed_after_the_grace() {
    let script = "trap '' TERM; echo ready; while :; do sleep 1; done";
    let mut running = sandbox().spawn(&shell(script)).expect("started");
    assert_eq!(running.next_line().await.expect("a line").text, "ready");
    let asked = Instant::now();
    let ended = running
        .stop(Duration::from_millis(300))
        .await
        .expect("ended");
    assert_eq!(ended.reason, Reason::Stopped);
    let took = asked.elapsed();
    assert!(took >= Duration::from_millis(250), "{took:?}");
}

#[tokio::test]
async fn a_daemon_does_not_outlive_its_parent() {
    let word = "98761.25";
    let script = format!("setsid setsid sleep {word} >/dev/null 2>&1 & sleep 0.2; echo started");
    let output = sandbox().run(&shell(&script)).await.expect("ran");
    assert_eq!(output.tail, "started\n");
    assert!(gone(word).await);
}

#[tokio::test]
async fn dropping_it_kills_everything() {
    let word = "98762.25";
    for die_with_parent in [true, false] {
        let job =
            shell(&format!("setsid sleep {word} & echo up; wait")).die_with_parent(die_with_parent);
        let mut running = sandbox().spawn(&job).expect("started");
        running.next_line().await.expect("a line");
        let until = Instant::now() + Duration::from_mins(1);
        while !runs(word) && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(runs(word));
        drop(running);
        assert!(gone(word).await);
    }
}

#[test]
fn the_end_of_the_runtime_ends_the_job() {
    let word = "98763.25";
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let running = runtime.block_on(async {
        let mut running = sandbox()
            .spawn(&shell(&format!("echo up; sleep {word}")))
            .expect("started");
        running.next_line().await.expect("a line");
        running
    });
    runtime.shutdown_timeout(Duration::from_secs(2));
    let again = tokio::runtime::Runtime::new().expect("runtime");
    assert!(again.block_on(gone(word)));
    drop(running);
}
