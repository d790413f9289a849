//! Makes a release live: run beside the live one, checked, switched to, checked again; or taken
//! back.
//!
//! Every step is written down before it is done, so that an order which was interrupted is carried
//! to its end by the same order given again.

use std::time::Duration;

use ports::{AcceptanceCheck, CheckResult, CheckStatus, Deployment, DeploymentStatus, Result};

use crate::checks::{Subject, accept_live, health, passed};
use crate::control::{self, Order, Phase};
use crate::deployer::{LocalDeployer, end, switch};
use crate::exchange::Place;
use crate::layout::{Layout, Lock};
use crate::release::prune;
use crate::state::{Release, State};

/// Between two looks at a service that starts.
const GLANCE: Duration = Duration::from_millis(25);
/// How long one try of the health check may take.
const TRY: Duration = Duration::from_secs(5);

/// One order on its way.
pub(crate) struct Rollout<'a> {
    pub deployer: &'a LocalDeployer,
    pub layout: &'a Layout,
    pub lock: &'a Lock,
    pub acceptance: &'a [AcceptanceCheck],
    pub port: u16,
    pub key: &'a str,
}

impl Rollout<'_> {
    /// Carries out the order that `state` has as pending.
    pub(crate) async fn carry_out(&self, state: &mut State) -> Result<Deployment> {
        let Some(mut pending) = state.pending.clone() else {
            return Err(crate::failures::supervisor(
                "there is no order to carry out",
            ));
        };
        let Some(release) = state.release(pending.release).cloned() else {
            return Err(crate::failures::supervisor(
                "the ordered release is not there",
            ));
        };
        let candidate = Candidate {
            layout: self.layout,
            lock: self.lock,
            number: release.number,
            spare: pending.before == Some(release.number),
        };
        let status = self
            .deployer
            .run(self.layout, &release, self.port, "deploy")
            .await?;
        // Left over from orders that were interrupted.
        for other in &status.releases {
            let wanted = [Some(release.number), pending.before].contains(&Some(other.release));
            if !wanted {
                let retire = Order::Retire {
                    release: other.release,
                };
                control::tell(self.layout, &retire).await?;
            }
        }
        if !pending.switched {
            pending.checks = self.examine(&release).await;
            if !passed(&pending.checks) {
                return self
                    .give_up(state, pending.before, &release, pending.checks, candidate)
                    .await;
            }
            // Written first: after a crash it is known which release should answer.
            pending.switched = true;
            state.live = Some(release.number);
            state.port = self.port;
            state.stopped = false;
            state.pending = Some(pending.clone());
            state.save(self.layout)?;
        }
        candidate.keep();
        self.switch(release.number).await?;
        let live = self.examine_live(&release).await;
        let good = passed(&live);
        pending.checks.extend(live);
        if !good {
            return self
                .take_back(state, pending.before, &release, pending.checks)
                .await;
        }

        for other in &mut state.releases {
            if other.status == DeploymentStatus::Live || other.status == DeploymentStatus::Stopped {
                other.status = DeploymentStatus::Superseded;
            }
        }
        let deployment = Deployment {
            release: release.number,
            sha: release.sha.clone(),
            status: DeploymentStatus::Live,
            url: state.url(),
            checks: pending.checks,
            live_release: None,
        };
        self.settle(state, &release, &deployment)?;
        if let Some(before) = pending.before.filter(|before| *before != release.number) {
            let retired = control::tell(self.layout, &Order::Retire { release: before }).await;
            if let Err(error) = retired {
                // It answers nobody any more, and goes at the next change.
                tracing::warn!(%error, release = before, "the last release could not be ended");
            }
        }
        Ok(deployment)
    }

    /// From now on the release answers at the public port.
    #[tracing::instrument(name = "deploy_step", skip_all, fields(step = "switch", project = %self.layout.project(), release))]
    async fn switch(&self, release: u64) -> Result<()> {
        control::tell(self.layout, &switch(release, self.port)).await?;
        Ok(())
    }

    /// Health and acceptance at the release's own door.
    #[tracing::instrument(name = "deploy_step", skip_all, fields(step = "check", project = %self.layout.project(), release = release.number))]
    async fn examine(&self, release: &Release) -> Vec<CheckResult> {
        let ready = self.ready(release).await;
        let mut results = vec![ready];
        if passed(&results) {
            let options = &self.deployer.options;
            let subject = Subject {
                sandbox: &options.sandbox,
                launcher: &options.program,
                launcher_args: &options.launch_args,
                tree: &self.layout.tree(release.number, &release.sha),
                door: &self.layout.door(release.number),
            };
            results.extend(subject.accept(self.acceptance).await);
            if !passed(&results)
                && let Some(log) = self.tail(release.number).await
            {
                results.push(log);
            }
        }
        results
    }

    /// What the service wrote, for whoever has to mend it.
    async fn tail(&self, release: u64) -> Option<CheckResult> {
        let status = control::tell(self.layout, &Order::Status).await.ok()?;
        let running = status.release(release)?;
        let detail = match running.phase {
            Phase::Running if running.tail.is_empty() => return None,
            Phase::Running => running.tail.join("\n"),
            Phase::Waiting | Phase::Failed => running.evidence(),
        };
        Some(CheckResult {
            name: "the service's log".to_owned(),
            status: CheckStatus::Failed,
            detail,
        })
    }

    /// Waits until the service answers its health check, or cannot any more.
    pub(crate) async fn ready(&self, release: &Release) -> CheckResult {
        let path = &release.service.health;
        let place = Place::Door(self.layout.door(release.number));
        let bound = Duration::from_secs(self.deployer.options.ready_s);
        let until = tokio::time::Instant::now() + bound;
        let result = |status, detail| CheckResult {
            name: format!("GET {path} answers"),
            status,
            detail,
        };
        loop {
            let seen = match health(&place, path, TRY).await {
                Ok(()) => return result(CheckStatus::Passed, String::new()),
                Err(seen) => seen,
            };
            let status = control::tell(self.layout, &Order::Status).await;
            let running = status
                .as_ref()
                .ok()
                .and_then(|status| status.release(release.number));
            let evidence = match running {
                Some(running) if running.phase == Phase::Failed => {
                    let detail = format!("the service ended: {}", running.evidence());
                    return result(CheckStatus::Failed, detail);
                }
                Some(running) => running.tail.join("\n"),
                None => "its supervisor does not know it".to_owned(),
            };
            if tokio::time::Instant::now() > until {
                let detail = format!(
                    "not ready within {} s; the last try: {seen}; its last lines:\n{evidence}",
                    bound.as_secs()
                );
                return result(CheckStatus::TimedOut, detail);
            }
            tokio::time::sleep(GLANCE).await;
        }
    }

    /// The same at the public port.
    #[tracing::instrument(name = "deploy_step", skip_all, fields(step = "check live", project = %self.layout.project(), release = release.number))]
    async fn examine_live(&self, release: &Release) -> Vec<CheckResult> {
        let path = &release.service.health;
        let seen = health(&Place::Port(self.port), path, TRY).await;
        let mut results = vec![CheckResult {
            name: format!("GET {path} answers (live)"),
            status: if seen.is_ok() {
                CheckStatus::Passed
            } else {
                CheckStatus::Failed
            },
            detail: seen.err().unwrap_or_default(),
        }];
        results.extend(accept_live(self.port, self.acceptance).await);
        results
    }

    /// It failed before it was live: the other one never stopped answering.
    async fn give_up(
        &self,
        state: &mut State,
        before: Option<u64>,
        release: &Release,
        checks: Vec<CheckResult>,
        candidate: Candidate<'_>,
    ) -> Result<Deployment> {
        candidate.keep();
        self.answer_with(state, before, release).await?;
        self.failed(state, before, release, checks).await
    }

    /// It failed while it was live: the other one, still running, answers again.
    async fn take_back(
        &self,
        state: &mut State,
        before: Option<u64>,
        release: &Release,
        checks: Vec<CheckResult>,
    ) -> Result<Deployment> {
        state.live = before;
        // The order goes on from here if it is given again: the release is not live any more.
        if let Some(pending) = &mut state.pending {
            pending.switched = false;
        }
        state.save(self.layout)?;
        self.answer_with(state, before, release).await?;
        self.failed(state, before, release, checks).await
    }

    /// Makes sure that the release from before answers, on its port, and ends the failed one.
    #[tracing::instrument(name = "deploy_step", skip_all, fields(step = "go back", project = %self.layout.project(), release = failed.number))]
    async fn answer_with(
        &self,
        state: &State,
        before: Option<u64>,
        failed: &Release,
    ) -> Result<()> {
        if let Some(before) = state.live().cloned().filter(|_| !state.stopped) {
            self.deployer
                .run(self.layout, &before, state.port, "go back")
                .await?;
            control::tell(self.layout, &switch(before.number, state.port)).await?;
            self.ready(&before).await;
        }
        if before != Some(failed.number) {
            let retire = Order::Retire {
                release: failed.number,
            };
            control::tell(self.layout, &retire).await?;
        }
        Ok(())
    }

    async fn failed(
        &self,
        state: &mut State,
        before: Option<u64>,
        release: &Release,
        checks: Vec<CheckResult>,
    ) -> Result<Deployment> {
        let stopped = state.stopped;
        let back = before.filter(|_| !stopped);
        let deployment = Deployment {
            release: release.number,
            sha: release.sha.clone(),
            status: if back.is_some() {
                DeploymentStatus::RolledBack
            } else {
                DeploymentStatus::Failed
            },
            url: state.url(),
            checks,
            live_release: back,
        };
        self.settle(state, release, &deployment)?;
        if back.is_none() {
            // Nothing is left to answer.
            end(self.layout).await?;
        }
        Ok(deployment)
    }

    /// Writes down how it went.
    fn settle(&self, state: &mut State, release: &Release, deployment: &Deployment) -> Result<()> {
        if let Some(record) = state.release_mut(release.number) {
            record.status = deployment.status;
            if deployment.status == DeploymentStatus::Live {
                record.good = true;
            }
        }
        state.pending = None;
        state.remember(self.key, deployment.clone());
        prune(self.layout, state);
        state.save(self.layout)
    }
}

/// A release that runs but is not decided on. If the order is abandoned (its future is dropped, or
/// something fails), it is ended.
struct Candidate<'a> {
    layout: &'a Layout,
    lock: &'a Lock,
    number: u64,
    /// It was live before, and stays.
    spare: bool,
}

impl Candidate<'_> {
    fn keep(mut self) {
        self.spare = true;
    }
}

impl Drop for Candidate<'_> {
    fn drop(&mut self) {
        if self.spare {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (layout, release) = (self.layout.clone(), self.number);
            // Whoever comes next must not have it ended under their hands.
            let lock = self.lock.clone();
            runtime.spawn(async move {
                let _ = control::tell(&layout, &Order::Retire { release }).await;
                drop(lock);
            });
        }
    }
}
