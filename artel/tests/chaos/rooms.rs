//! Two spawners of different room on one Redis, each a process of its own: who takes what, and who takes over.

use crate::crew::{Crew, commits, git, task};
use crate::engine::Engine;
use crate::support::redis::Redis;
use crate::support::{Home, Running, eventually};
use crate::{SOON, left, up};
use futures::StreamExt as _;
use protocol::{EventKind, Size, Transport as _};
use std::collections::BTreeMap;

/// What the small one has, and a job of which it carries two.
const SMALL: (&str, &str) = ("1", "256");
const LITTLE: Size = size(500, 128);
/// What the large one has, and a job of which it carries two, and the small one none.
const LARGE: (&str, &str) = ("4", "4096");
const BIG: Size = size(2000, 1500);

const fn size(cpu_milli: u64, memory_mb: u64) -> Size {
    Size {
        cpu_milli,
        memory_mb,
    }
}

fn home(redis: &Redis) -> Home {
    let mut home = Home::with_tape();
    home.set("REDIS_URL", &redis.url());
    home.set("SPAWNER_RUNTIME", "bubblewrap");
    // The workspaces are looked into from here.
    home.set("SPAWNER_DISK", "polled");
    home
}

/// A spawner on this home with so many cores and so much memory.
async fn spawner(home: &mut Home, (cores, memory_mb): (&str, &str)) -> Running {
    home.set("SPAWNER_CPUS", cores);
    home.set("SPAWNER_MEMORY_MB", memory_mb);
    let mut spawner = home.start_spawner();
    up(&mut spawner).await;
    spawner
}

/// The number of the process with this name, which is `spawner-HOST-PROCESS-CHANCE`.
fn number(name: &str) -> u32 {
    let number = name.rsplit('-').nth(1);
    number.and_then(|number| number.parse().ok()).unwrap()
}

/// Each task works until it is told to go on.
async fn crew(redis: &Redis) -> Crew {
    let wait = "touch here; while [ ! -e go ]; do sleep 0.1; done; rm -f here go\n";
    Crew::new(&redis.url(), move |n| format!("{wait}{}", commits(n, "0"))).await
}

/// Tells the task that it may go on, as soon as it is at work in the workspace of this home.
async fn go(home: &Home, n: usize) {
    let workspace = home.file(&format!("workspaces/p/job-1/{}", task(n)));
    eventually("the task is at work", SOON, || async {
        workspace.join("here").exists().then_some(())
    })
    .await;
    std::fs::write(workspace.join("go"), "").unwrap();
}

/// The processes that have begun the task, one after the other; waits until there are so many.
async fn begun(crew: &Crew, n: usize, times: usize) -> Vec<u32> {
    let events = crew.bus.events(&Crew::first(n)).await.unwrap();
    let names = events.filter_map(async |event| match event.kind {
        EventKind::Started { spawner } => Some(number(&spawner)),
        _ => None,
    });
    let seen = tokio::time::timeout(SOON, names.take(times).collect::<Vec<_>>()).await;
    seen.unwrap_or_else(|_| panic!("task {n} did not begin {times} times"))
}

/// All processes that have begun the task, which is over.
async fn begun_by(crew: &Crew, n: usize) -> Vec<u32> {
    begun(crew, n, usize::MAX).await
}

/// Who holds which request, and how often it was handed out.
fn held(redis: &Redis) -> BTreeMap<String, (u32, u32)> {
    let client = redis::Client::open(redis.url()).unwrap();
    let mut redis = client.get_connection().unwrap();
    let entries: Vec<(String, String, u64, u32)> = redis::cmd("XPENDING")
        .arg("worker:jobs")
        .arg("spawners")
        .arg(&["-", "+", "100"])
        .query(&mut redis)
        .unwrap();
    let held = entries.into_iter().filter(|(_, who, ..)| who != "nobody");
    held.map(|(entry, who, _, times)| {
        let found: Vec<(String, Vec<(String, String)>)> = redis::cmd("XRANGE")
            .arg("worker:jobs")
            .arg(&[&entry, &entry])
            .query(&mut redis)
            .unwrap();
        let request = protocol::decode::request(found[0].1[0].1.as_bytes()).unwrap();
        (request.request_id, (number(&who), times))
    })
    .collect()
}

#[tokio::test]
async fn two_spawners_each_take_what_they_carry_and_the_work_of_a_killed_one_is_taken_over() {
    let redis = Redis::start().await;
    // As on two machines: neither sees the other one but over Redis.
    let (mut here, mut there) = (home(&redis), home(&redis));
    let mut small = spawner(&mut here, SMALL).await;
    let mut large = spawner(&mut there, LARGE).await;
    let (s, l) = (small.child.id().unwrap(), large.child.id().unwrap());
    let crew = crew(&redis).await;
    // Two that only the large one can carry, and then it is full.
    for n in [0, 1] {
        crew.send_sized(n, BIG).await;
        assert_eq!(begun(&crew, n, 1).await, [l]);
    }
    for n in [2, 3] {
        crew.send_sized(n, LITTLE).await;
        assert_eq!(begun(&crew, n, 1).await, [s]);
    }
    // Both are full: the next ones stay where they are.
    crew.send_sized(4, LITTLE).await;
    crew.send_sized(5, BIG).await;
    let all = |times: [(usize, u32); 4]| {
        let of = times.map(|(n, who)| (Crew::first(n), (who, 1)));
        BTreeMap::from(of)
    };
    assert_eq!(held(&redis), all([(0, l), (1, l), (2, s), (3, s)]));
    // What becomes free at the large one is for little ones too.
    go(&there, 0).await;
    assert_eq!(begun(&crew, 4, 1).await, [l]);
    go(&there, 1).await;
    assert_eq!(begun(&crew, 5, 1).await, [l]);
    // The one dies while it works; the other one has place for both, when its holds have run out.
    small.kill().await;
    for n in [2, 3] {
        assert_eq!(begun(&crew, n, 2).await, [s, l]);
    }
    for n in 2..6 {
        go(&there, n).await;
    }
    crew.until_all_is_done(SOON).await;
    assert_eq!(crew.every_job_ended_once(6), 0, "nothing was lost");
    for (n, by) in [(0, vec![l]), (1, vec![l]), (4, vec![l]), (5, vec![l])] {
        assert_eq!(begun_by(&crew, n).await, by, "task {n}");
    }
    for n in [2, 3] {
        assert_eq!(begun_by(&crew, n).await, [s, l], "task {n}");
    }
    left::in_redis(&redis.url());
    assert_eq!(large.terminate(SOON).await, 0);
    left::on_the_machine(&there, None, 6);
}

#[tokio::test]
async fn of_a_killed_large_spawner_the_small_one_takes_over_what_it_carries_and_the_rest_waits() {
    let redis = Redis::start().await;
    let mut home = home(&redis);
    let crew = crew(&redis).await;
    let mut small = spawner(&mut home, SMALL).await;
    for n in [0, 1] {
        crew.send_sized(n, LITTLE).await;
        begun(&crew, n, 1).await;
    }
    // Both on one machine, where who died is seen at once.
    let mut large = spawner(&mut home, LARGE).await;
    let (s, l) = (small.child.id().unwrap(), large.child.id().unwrap());
    for (n, size) in [(2, BIG), (3, LITTLE)] {
        crew.send_sized(n, size).await;
        assert_eq!(begun(&crew, n, 1).await, [l]);
    }
    large.kill().await;
    // The next large one has one place, which is for the oldest that it can carry.
    home.set("SPAWNER_MAX_WORKERS", "1");
    let mut next = spawner(&mut home, LARGE).await;
    let x = next.child.id().unwrap();
    assert_eq!(begun(&crew, 2, 2).await, [l, x]);
    go(&home, 0).await;
    assert_eq!(begun(&crew, 3, 2).await, [l, s]);
    for n in 1..4 {
        go(&home, n).await;
    }
    crew.until_all_is_done(SOON).await;
    assert_eq!(crew.every_job_ended_once(4), 0, "nothing was lost");
    for (n, by) in [(0, vec![s]), (1, vec![s]), (2, vec![l, x]), (3, vec![l, s])] {
        assert_eq!(begun_by(&crew, n).await, by, "task {n}");
    }
    left::in_redis(&redis.url());
    for spawner in [&mut small, &mut next] {
        assert_eq!(spawner.terminate(SOON).await, 0);
    }
    left::on_the_machine(&home, None, 4);
}

/// Workers in containers of this engine.
fn contained(redis: &Redis, engine: &Engine) -> Home {
    let mut home = home(redis);
    home.set("SPAWNER_RUNTIME", "runc");
    home.set("DOCKER_HOST", &engine.host);
    home.set("WORKER_IMAGE", &engine.image);
    home
}

#[tokio::test]
async fn what_a_killed_spawner_had_in_containers_is_done_elsewhere_once_and_goes_when_it_comes_back()
 {
    let (redis, engine) = (Redis::start().await, Engine::shared());
    // One engine, and one home for each.
    let mut here = contained(&redis, &engine);
    let mut there = contained(&redis, &engine);
    let crew = crew(&redis).await;
    let mut first = spawner(&mut here, LARGE).await;
    let f = first.child.id().unwrap();
    let workspace = |home: &Home, n| home.file(&format!("workspaces/p/job-1/{}", task(n)));
    for n in [0, 1] {
        crew.send_sized(n, LITTLE).await;
        assert_eq!(begun(&crew, n, 1).await, [f]);
        let at_work = workspace(&here, n).join("here");
        eventually("it works in its container", SOON, || async {
            at_work.exists().then_some(())
        })
        .await;
    }
    let mut second = spawner(&mut there, LARGE).await;
    let s = second.child.id().unwrap();
    let orphans = engine.working(here.path());
    assert_eq!(orphans.len(), 2);
    first.kill().await;
    // Its holds run out, and the other one begins anew, in its own home.
    for n in [0, 1] {
        assert_eq!(begun(&crew, n, 2).await, [f, s]);
    }
    assert_eq!(
        engine.working(here.path()),
        orphans,
        "they are another home's"
    );
    for n in [0, 1] {
        go(&there, n).await;
    }
    crew.until_all_is_done(SOON).await;
    assert_eq!(crew.every_job_ended_once(2), 0, "nothing was lost");
    assert_eq!(engine.working(here.path()), orphans);
    // One of them does its work all the same, for nobody.
    std::fs::write(workspace(&here, 0).join("go"), "").unwrap();
    eventually("it has committed", SOON, || async {
        let made = git(
            &workspace(&here, 0),
            &["-c", "safe.directory=*", "log", "--all", "--format=%s"],
        );
        made.contains("Task 0").then_some(())
    })
    .await;
    let mut again = spawner(&mut here, LARGE).await;
    eventually("the orphans are removed", SOON, || async {
        engine.of_home(here.path()).is_empty().then_some(())
    })
    .await;
    // Without a second outcome, and without another attempt.
    crew.until_all_is_done(SOON).await;
    assert_eq!(crew.every_job_ended_once(2), 0);
    for n in [0, 1] {
        assert_eq!(begun_by(&crew, n).await, [f, s], "task {n}");
    }
    left::in_redis(&redis.url());
    for (home, spawner) in [(&here, &mut again), (&there, &mut second)] {
        assert_eq!(spawner.terminate(SOON).await, 0);
        left::on_the_machine(home, Some(&engine), 2);
    }
}
