//! Many jobs over a real Redis, on real engines, and what they stand on killed at random: every job ends in exactly one outcome,
//! and nothing is left over. `make soak` runs the long forms, with `ARTEL_SOAK` set.

mod crew;
mod engine;
mod kills;
mod left;
mod many;
mod rooms;
#[path = "../support/mod.rs"]
mod support;

use crate::crew::Crew;
use crate::engine::Engine;
use crate::support::redis::Redis;
use crate::support::{Home, Running};
use std::time::Duration;

/// Bound of every wait for something small.
const SOON: Duration = Duration::from_mins(2);

/// Whether this is the long form.
fn soak() -> bool {
    std::env::var_os("ARTEL_SOAK").is_some()
}

/// A spawner, which is a process of its own, and what it stands on.
struct House {
    home: Home,
    redis: Redis,
    /// None: workers run in bubblewrap.
    engine: Option<Engine>,
    /// Whether that was killed.
    engine_died: bool,
    spawner: Running,
}

impl House {
    async fn new(engine: Option<Engine>, at_a_time: usize) -> Self {
        Self::with(&[], engine, at_a_time).await
    }

    /// With these settings.
    async fn with(settings: &[(&str, &str)], engine: Option<Engine>, at_a_time: usize) -> Self {
        let redis = Redis::start().await;
        let mut home = Home::with_tape();
        home.set("REDIS_URL", &redis.url());
        home.set("SPAWNER_MAX_WORKERS", &at_a_time.to_string());
        // However small the machine is: these workers do next to nothing.
        home.set("SPAWNER_CPUS", "16");
        home.set("SPAWNER_MEMORY_MB", "8192");
        for (name, value) in settings {
            home.set(name, value);
        }
        // What a container that waits is made for: all jobs here are alike.
        let limits = format!(
            "[policy.limits]\ncpu = {:?}\nmemory_mb = {}\ndisk_mb = {}\n",
            crew::CORES,
            crew::MEMORY_MB,
            crew::DISK_MB
        );
        std::fs::write(home.file("artel.toml"), limits).unwrap();
        match &engine {
            None => home.set("SPAWNER_RUNTIME", "bubblewrap"),
            Some(engine) => {
                home.set("SPAWNER_RUNTIME", "runc");
                home.set("DOCKER_HOST", &engine.host);
                home.set("WORKER_IMAGE", &engine.image);
            }
        }
        let mut spawner = home.start_spawner();
        up(&mut spawner).await;
        Self {
            home,
            redis,
            engine,
            engine_died: false,
            spawner,
        }
    }

    async fn crew(&self, script: impl Fn(usize) -> String + Send + Sync + 'static) -> Crew {
        Crew::new(&self.redis.url(), script).await
    }

    /// `kill -9`, and another one in its place.
    async fn replace_spawner(&mut self) {
        self.spawner.kill().await;
        self.spawner = self.home.start_spawner();
        up(&mut self.spawner).await;
    }

    /// Ends the spawner, and looks whether something is left.
    async fn nothing_is_left(mut self, tasks: usize) {
        // What could not be removed at the end of a job is removed a little later.
        support::eventually("no container is left but those that wait", SOON, || async {
            let engine = self.engine.as_ref();
            engine
                .is_none_or(|engine| engine.used(self.home.path()).is_empty())
                .then_some(())
        })
        .await;
        if self.engine_died {
            // Nor of what that has made and never begun.
            support::eventually("no process waits to begin", SOON, || async {
                left::unbegun(&self.home).is_empty().then_some(())
            })
            .await;
        }
        left::in_redis(&self.redis.url());
        assert_eq!(self.spawner.terminate(SOON).await, 0);
        left::on_the_machine(&self.home, self.engine.as_ref(), tasks);
    }
}

async fn up(spawner: &mut Running) {
    spawner
        .line("the spawner is up", SOON, |line| {
            line.contains(" is up on ")
        })
        .await;
}
