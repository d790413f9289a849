//! Containers that wait for a job: made, handed over, and cleared away.
//!
//! One that waits is confined as every worker, runs nothing but our own program, and has seen no job before. It serves one
//! attempt and is removed. Whatever goes wrong with it before it begins, the attempt gets a container of its own.

use super::go::{Go, Line, NEVER_BEGAN, SOCKET};
use super::pool::{self, Slot, Taken};
use super::{
    BROKER, Contained, Containers, Found, Identity, LABEL, Path, Spec, WORKSPACE, Work, Worker,
    argv, base_env, deadline_s, docker_limits, env_of, label, mount, program, whose,
};
use crate::disk;
use crate::docker;
use crate::runtime::{Error, Limits};
use crate::trouble::chain;
use std::io;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a container may take until it waits.
const UP: Duration = Duration::from_secs(30);
/// How long one that waits may take until it can begin.
const TAKES: Duration = Duration::from_secs(2);
/// How often it is looked whether they still wait.
const LOOK: Duration = Duration::from_secs(2);
/// How long the next one is not made after one was taken: what has just begun goes first.
const AFTER_YOU: Duration = Duration::from_millis(250);
/// The longest pause after one could not be made.
const LONGEST_PAUSE: Duration = Duration::from_mins(5);
/// The label that says which slot's a container is.
const SLOT: &str = "slot";
/// What the label `part` says of it.
const POOL: &str = "pool";

impl Containers {
    /// How many containers wait for a job now.
    pub fn waiting(&self) -> usize {
        self.pool.count()
    }

    /// A container that waited, now with this work; none if there is none for it.
    pub(super) async fn start_warm(&self, work: &Work, image: &str) -> Option<Box<dyn Worker>> {
        let slot = self.pool.take_for(work, image)?;
        let container = slot.container.clone();
        match self.hand(slot, work).await {
            Ok(worker) => Some(worker),
            Err(error) => {
                // The slot is nobody's now, so that whoever keeps the pool removes it.
                self.pool.changed.notify_one();
                tracing::warn!(
                    %error,
                    container,
                    "a container that waited could not be used; making another one"
                );
                None
            }
        }
    }

    /// Makes the disk of a container that waits a task's, and keeps the container for the request.
    pub(super) async fn lend(
        &self,
        who: &Identity,
        limits: &Limits,
        state: &Path,
    ) -> Result<bool, Error> {
        if !self.pool.has_disks() || !self.pool.allows(limits) || self.waiting() == 0 {
            return Ok(false);
        }
        let image = self.engine.image(&self.image).await?;
        let Some(mut slot) = self.pool.take(&image) else {
            self.pool.changed.notify_one();
            return Ok(false);
        };
        let state = state.to_owned();
        // If nobody waits for this any more, the slot is nobody's when it is done.
        let lent = disk::blocking(move || Ok(slot.place.lend_disk(&state)?.then_some(slot))).await;
        match lent {
            Ok(Some(slot)) => {
                self.pool.lend(&who.request, slot);
                Ok(true)
            }
            other => {
                self.pool.changed.notify_one();
                other.map(|_| false).map_err(|error| {
                    Error::Machine(
                        "the disk of a container that waits",
                        io::Error::other(error),
                    )
                })
            }
        }
    }

    async fn hand(&self, mut slot: Slot, work: &Work) -> io::Result<Box<dyn Worker>> {
        let go = Go {
            argv: argv(work),
            env: env_of(work),
        };
        let (Some(frame), Some(relay)) = (go.frame(), &work.relay) else {
            return Err(io::ErrorKind::ArgumentListTooLong.into());
        };
        // It lives, and knows what to do, before anything of the task is touched.
        within(slot.line.tell(&frame)).await?;
        slot.place.move_in(&work.workspace, &relay.folder)?;
        let who = &work.who;
        let taken = Taken {
            container: slot.container.clone(),
            project: who.project.clone(),
            job: who.job.clone(),
            task: who.task.clone(),
            request: who.request.clone(),
            attempt: who.attempt,
            at_s: jiff::Timestamp::now().as_second(),
            deadline_s: deadline_s(&work.limits),
        };
        // Before it begins: one that works and is nobody's would be ended by whoever comes after us.
        slot.place.sign(&taken)?;
        let limits = docker_limits(&work.limits, &work.workspace);
        let running = self.engine.watch(&slot.container, &limits);
        if let Err(error) = within(slot.line.begin()).await {
            slot.place.unsign()?;
            return Err(error);
        }
        Ok(Contained::watch(running, Some(slot.place.lock)))
    }

    /// Keeps so many containers ready until `stop`, and then none. What nobody has is cleared away, whoever made it.
    pub(super) async fn keep_pool(&self, disks: bool, stop: &CancellationToken) {
        self.pool.set_disks(disks);
        let mut strays = true;
        let (mut not_before, mut pause) = (Instant::now(), LOOK);
        while !stop.is_cancelled() {
            let dead = self.pool.drop_dead();
            if dead > 0 {
                tracing::warn!("{dead} containers that waited are gone; others are made");
            }
            strays &= !self.sweep(strays).await;
            while self.waiting() < self.pool.warm.count
                && !stop.is_cancelled()
                && Instant::now() >= not_before
            {
                match self.prepare().await {
                    Ok(slot) => {
                        self.pool.put(slot);
                        pause = LOOK;
                    }
                    Err(error) => {
                        let error = chain(&error);
                        tracing::warn!(
                            error,
                            "no container could be kept ready; trying again in {} s",
                            pause.as_secs()
                        );
                        not_before = Instant::now() + pause;
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(LOOK) => {}
                () = self.pool.changed.notified() => {
                    let _ = tokio::time::timeout(AFTER_YOU, stop.cancelled()).await;
                }
            }
        }
        self.pool.empty();
        self.sweep(false).await;
    }

    /// Makes one, and returns when it waits. What is left of one that does not come so far is nobody's.
    async fn prepare(&self) -> Result<Slot, Error> {
        let machine = |error| Error::Machine("a place for a container that waits", error);
        let image = self.engine.image(&self.image).await?;
        let (place, door) = self.pool.prepare().map_err(machine)?;
        let (owner, disk_mb) = (self.owner_outside(), self.pool.warm.limits.disk_mb);
        let furnished = disk::blocking(move || place.furnish(owner, disk_mb).map(|()| place)).await;
        let place = furnished.map_err(|error| machine(io::Error::other(error)))?;
        let limits = docker_limits(&self.pool.warm.limits, &place.workspace());
        let mut labels = self.labels(POOL, &self.pool.warm.limits);
        labels.insert(SLOT.to_owned(), place.name());
        let door_inside = format!("{BROKER}/{SOCKET}");
        let spec = Spec {
            name: format!("artel-waits-{}", place.name()),
            image: image.clone(),
            argv: program(&["wait", &door_inside]),
            env: base_env(),
            user: self.user.0,
            cwd: WORKSPACE.into(),
            mounts: vec![
                mount(&place.workspace(), Path::new(WORKSPACE), true),
                mount(&place.broker(), Path::new(BROKER), false),
            ],
            limits,
            labels,
            docker_inside: false,
        };
        let container = self.engine.create(&spec).await?;
        self.engine.begin(&container).await?;
        let waits = tokio::time::timeout(UP, door.accept()).await;
        let (line, _) = waits
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| Error::Machine("a container that waits", error))?;
        place.close_door().map_err(machine)?;
        // The container has it, and when that ends, however it does, nobody has it.
        let unmounted = disk::blocking(move || place.unmount().map(|()| place)).await;
        let place = unmounted.map_err(|error| machine(io::Error::other(error)))?;
        Ok(Slot {
            place,
            container,
            image,
            line: Line(line),
        })
    }

    /// Removes slots that nobody has, with their containers; and, if asked to, containers without a slot. Returns whether that
    /// was possible.
    async fn sweep(&self, strays: bool) -> bool {
        let swept = self.try_sweep(strays).await;
        if let Err(error) = &swept {
            let error = chain(error);
            tracing::warn!(
                error,
                "what is left of containers that waited was not removed; trying again"
            );
        }
        swept.is_ok()
    }

    async fn try_sweep(&self, strays: bool) -> Result<(), Error> {
        let machine = |error| Error::Machine("to read the folder of the pool", error);
        // Before the containers are listed: a slot is made before its container.
        let slots = self.pool.slots().map_err(machine)?;
        let free: Vec<_> = slots
            .into_iter()
            .filter_map(|slot| Some((pool::hold(&slot)?, slot)))
            .collect();
        if free.is_empty() && !strays {
            return Ok(());
        }
        let containers = self.engine.ours(&self.home).await?;
        self.remove_without_slot(&containers).await?;
        for (_lock, slot) in free {
            let name = slot.file_name().unwrap_or_default().to_string_lossy();
            let container = containers
                .iter()
                .find(|found| label(found, "part") == POOL && label(found, SLOT) == name);
            match container {
                // Its attempt, or nobody's request, decides what becomes of it.
                Some(_) if pool::taken(&slot).is_some() => continue,
                Some(found) => self.engine.remove(&found.id).await?,
                None => {}
            }
            remove_slot(&slot).await?;
        }
        Ok(())
    }

    /// Removes containers whose slot is gone: of a spawner that was killed, an engine may make one when the next spawner has
    /// looked already.
    pub(super) async fn end_without_slot(&self) -> Result<usize, Error> {
        let containers = self.engine.ours(&self.home).await?;
        self.remove_without_slot(&containers).await
    }

    async fn remove_without_slot(&self, containers: &[Found]) -> Result<usize, Error> {
        let mut count = 0;
        for found in containers
            .iter()
            .filter(|found| label(found, "part") == POOL)
        {
            let slot = self.pool.slot(label(found, SLOT));
            if !slot.is_some_and(|slot| slot.is_dir()) {
                self.engine.remove(&found.id).await?;
                count += 1;
            }
        }
        Ok(count)
    }

    /// What a request has taken, if it ever began: running, or ended with its evidence.
    pub(super) async fn adopt_taken(
        &self,
        who: &Identity,
        limits: &Limits,
        workspace: &Path,
    ) -> Result<Option<Box<dyn Worker>>, Error> {
        let Some((slot, taken)) = self.taken_by(who)? else {
            return Ok(None);
        };
        if self.engine.ended_with(&taken.container).await? == Some(NEVER_BEGAN.into()) {
            self.discard_taken(who).await?;
            return Ok(None);
        }
        let limits = docker_limits(limits, workspace);
        let since = jiff::Timestamp::from_second(taken.at_s).ok();
        let adopted = self
            .engine
            .find_and_adopt(&taken.container, &self.home, &limits, since)
            .await?;
        Ok(adopted.map(|running| Contained::watch(running, pool::hold(&slot))))
    }

    /// Removes what a request has taken, or was to take.
    pub(super) async fn discard_taken(&self, who: &Identity) -> Result<(), Error> {
        if let Some(lent) = self.pool.take_lent(&who.request) {
            self.engine.remove(&lent.container).await?;
            remove_slot(&lent.place.folder).await?;
        }
        let Some((slot, taken)) = self.taken_by(who)? else {
            return Ok(());
        };
        self.engine.remove(&taken.container).await?;
        remove_slot(&slot).await
    }

    fn taken_by(&self, who: &Identity) -> Result<Option<(std::path::PathBuf, Taken)>, Error> {
        self.pool
            .taken_by(who)
            .map_err(|error| Error::Machine("to read the folder of the pool", error))
    }

    /// All containers that work or have worked for somebody, each with the labels that say for whom.
    pub(super) async fn at_work(&self) -> Result<Vec<Found>, docker::Error> {
        let all = self.engine.ours(&self.home).await?;
        Ok(all
            .into_iter()
            .filter_map(|found| self.signed(found))
            .collect())
    }

    fn signed(&self, mut found: Found) -> Option<Found> {
        if label(&found, "part") != POOL {
            return Some(found);
        }
        let taken = pool::taken(&self.pool.slot(label(&found, SLOT))?)?;
        if taken.container != found.id {
            return None;
        }
        let part = super::part_name(super::Part::Agent).to_owned();
        let deadline_s = taken.deadline_s;
        let labels = whose(&taken.who(), deadline_s).into_iter();
        let all = labels.chain([("part".to_owned(), part)]);
        let named = all.map(|(name, value)| (format!("{LABEL}.{name}"), value));
        found.labels.extend(named);
        Some(found)
    }
}

async fn remove_slot(slot: &Path) -> Result<(), Error> {
    let folder = slot.to_owned();
    let removed = disk::blocking(move || pool::remove(&folder)).await;
    removed
        .map_err(|error| Error::Machine("to tidy the folder of the pool", io::Error::other(error)))
}

async fn within<T>(what: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let outcome = tokio::time::timeout(TAKES, what).await;
    outcome.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
