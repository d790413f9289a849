//! What the jobs stand on is killed at random while they run: the spawner, workers, Redis, the Docker daemon.
//!
//! `ARTEL_CHAOS_SEED` repeats when and what is killed, as far as the machine does the same.

use crate::crew::commits;
use crate::engine::Engine;
use crate::support::eventually;
use crate::{House, SOON, soak};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use std::time::{Duration, Instant};

/// Jobs at a time.
const AT_A_TIME: usize = 4;
/// Bound of everything; the long form takes some minutes.
const WORK: Duration = Duration::from_mins(15);

/// How many jobs there are, and how often something is killed under them.
fn numbers(jobs: usize, kills: usize) -> (usize, usize) {
    if soak() { (50, 20) } else { (jobs, kills) }
}

/// Chance, repeatable by the seed that is printed.
fn chance() -> StdRng {
    let seed = std::env::var("ARTEL_CHAOS_SEED").map_or_else(
        |_| rand::random(),
        |seed| seed.parse().expect("ARTEL_CHAOS_SEED is a number"),
    );
    eprintln!("ARTEL_CHAOS_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Sends all jobs, each of which takes `moment` seconds at least, and kills with `kill` while they are done, each time at a
/// random moment after some more of them are done.
/// Gives the house back, and how many requests were lost.
async fn storm(
    mut house: House,
    (jobs, kills): (usize, usize),
    moment: &'static str,
    mut kill: impl AsyncFnMut(&mut House, &mut StdRng),
) -> (House, usize) {
    let mut chance = chance();
    let crew = house.crew(|n| commits(n, moment)).await;
    for n in 0..jobs {
        crew.send(n, 1).await;
    }
    let killing = async {
        for n in 0..kills {
            let enough = n * jobs.saturating_sub(AT_A_TIME) / kills;
            let start = Instant::now();
            while crew.done() < enough {
                assert!(
                    start.elapsed() < WORK,
                    "{} of {enough} are done",
                    crew.done()
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::time::sleep(Duration::from_millis(chance.random_range(0..1500))).await;
            kill(&mut house, &mut chance).await;
            eprintln!("kill {} with {} of {jobs} done", n + 1, crew.done());
        }
    };
    tokio::join!(killing, crew.until_all_is_done(WORK));
    // Some of the last kills may have come when all was done; what they hit is as it was.
    let lost = crew.every_job_ended_once(jobs);
    eprintln!("{jobs} jobs, {kills} kills, {lost} requests lost and sent again");
    (house, lost)
}

async fn kill_the_spawner(engine: Option<Engine>, jobs: usize, kills: usize) {
    let (jobs, kills) = numbers(jobs, kills);
    let house = House::new(engine, AT_A_TIME).await;
    let (house, lost) = storm(house, (jobs, kills), "0.5", async |house, _| {
        house.replace_spawner().await;
    })
    .await;
    assert_eq!(lost, 0, "the next spawner goes on, or begins again");
    house.nothing_is_left(jobs).await;
}

#[tokio::test]
async fn a_spawner_that_is_killed_again_and_again_loses_no_job_and_does_none_twice() {
    kill_the_spawner(None, 10, 3).await;
}

#[tokio::test]
async fn workers_in_containers_outlive_a_spawner_that_is_killed_again_and_again() {
    kill_the_spawner(Some(Engine::shared()), 10, 3).await;
}

#[tokio::test]
async fn a_worker_that_is_killed_is_lost_with_evidence_and_its_task_done_by_the_next_attempt() {
    let (jobs, kills) = numbers(8, 3);
    let house = House::new(Some(Engine::shared()), AT_A_TIME).await;
    let (house, _) = storm(house, (jobs, kills), "0.5", async |house, chance| {
        house.kill_a_worker(chance);
    })
    .await;
    house.nothing_is_left(jobs).await;
}

impl House {
    fn kill_a_worker(&self, chance: &mut StdRng) {
        let engine = self.engine.as_ref().unwrap();
        let working = engine.working(self.home.path());
        if !working.is_empty() {
            // It may have ended by itself just now.
            engine.docker(&["kill", &working[chance.random_range(0..working.len())]]);
        }
    }

    async fn replace_redis(&mut self, chance: &mut StdRng) {
        self.redis.kill();
        tokio::time::sleep(Duration::from_millis(chance.random_range(0..2000))).await;
        self.redis.up().await;
    }

    async fn replace_the_engine(&mut self, chance: &mut StdRng) {
        self.engine_died = true;
        let engine = self.engine.as_mut().unwrap();
        engine.kill();
        tokio::time::sleep(Duration::from_millis(chance.random_range(0..1000))).await;
        engine.up().await;
    }
}

#[tokio::test]
async fn whatever_is_killed_jobs_in_containers_that_waited_are_done_once_and_none_is_left() {
    let (jobs, kills) = numbers(8, 4);
    let warm = [("SPAWNER_WARM", "2")];
    let house = House::with(&warm, Some(Engine::own(false).await), AT_A_TIME).await;
    let (engine, home) = (house.engine.as_ref().unwrap(), house.home.path());
    eventually("two containers wait", SOON, || async {
        (engine.of_home(home).len() == 2).then_some(())
    })
    .await;
    let mut turn = 0;
    let (house, _) = storm(house, (jobs, kills), "1", async |house, chance| {
        match turn % 4 {
            0 => {
                let pool = house.home.file("pool");
                let takes = || async {
                    let mut slots = std::fs::read_dir(&pool).ok()?.flatten();
                    let taken = slots.any(|slot| slot.path().join("taken").exists());
                    taken.then_some(())
                };
                if turn == 0 {
                    eventually("a container that waited works", SOON, takes).await;
                }
                house.replace_spawner().await;
            }
            1 => house.kill_a_worker(chance),
            2 => house.replace_redis(chance).await,
            _ => house.replace_the_engine(chance).await,
        }
        turn += 1;
    })
    .await;
    house.nothing_is_left(jobs).await;
}

#[tokio::test]
async fn redis_is_killed_and_comes_back_and_no_job_is_lost_or_done_twice() {
    let (jobs, kills) = numbers(10, 3);
    let house = House::new(None, AT_A_TIME).await;
    let (house, lost) = storm(house, (jobs, kills), "0.5", async |house, chance| {
        house.replace_redis(chance).await;
    })
    .await;
    assert_eq!(lost, 0);
    house.nothing_is_left(jobs).await;
}

async fn kill_the_engine(live_restore: bool) -> usize {
    // Work that lasts longer than the daemon is away.
    let (jobs, kills) = numbers(8, 2);
    let house = House::new(Some(Engine::own(live_restore).await), AT_A_TIME).await;
    let (house, lost) = storm(house, (jobs, kills), "3", async |house, chance| {
        house.replace_the_engine(chance).await;
    })
    .await;
    house.nothing_is_left(jobs).await;
    lost
}

#[tokio::test]
async fn a_docker_daemon_that_is_killed_takes_its_workers_along_and_their_tasks_are_done_all_the_same()
 {
    kill_the_engine(false).await;
}

#[tokio::test]
async fn workers_outlive_a_docker_daemon_with_live_restore() {
    assert_eq!(kill_the_engine(true).await, 0);
}
