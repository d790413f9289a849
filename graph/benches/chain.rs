//! The engine against the limit of its database: how many supersteps a second it takes on each of them, beside how many
//! one-row commits a second `pgbench` makes on the same server, in the same minutes.
//!
//! A chain of 20 nodes, each of which adds one and appends 64 bytes; every superstep is committed before the next one
//! starts. `plain` is the bare chain, so many threads at a time as the table says. In `mailed` each step also consumes a
//! signal and says an event, in its one commit.
//!
//! `ARTEL_TEST_DATABASE_URL` names the server (`make bench` starts one). `ARTEL_BENCH_JSON` names a file for the figures;
//! `ARTEL_BENCH_ROUNDS` and `ARTEL_BENCH_SECONDS` say how long it takes, `ARTEL_BENCH_THREADS` (such as `1,16`) with how many
//! threads at a time. Arguments choose among `plain.postgres`,
//! `mailed.sqlite` and so on, by any piece of the name.

#[path = "workloads/chain.rs"]
mod chains;
mod lab;

use std::{collections::BTreeMap, time::Duration};

use chains::{Chains, NODES};
use lab::{
    Failed, chosen,
    commits::CommitLimit,
    database::{Database, server},
    report::{Bound, Report, median, median_ratio},
    setting,
};

/// Threads at a time, on every contestant.
const THREADS: [usize; 3] = [1, 16, 64];
/// Threads at a time, on PostgreSQL only: more than the limit is measured with.
const CROWD: usize = 256;
/// Threads at a time, the clients whose commits they are compared with, and how many per cent of them it has to be: plain,
/// and with mail.
const PROMISES: [(usize, usize, f64, f64); 4] = [
    (1, 1, 70.0, 35.0),
    (16, 16, 80.0, 40.0),
    (64, 64, 130.0, 65.0),
    (CROWD, 64, 200.0, 100.0),
];
const COMMITS: &str = "commits";

/// All rates of a contestant, by threads at a time, a rate for each round.
type Rates = BTreeMap<(String, usize), Vec<f64>>;

struct Contestant {
    name: String,
    chains: Chains,
    with_mail: bool,
    crowded: bool,
}

impl Contestant {
    async fn rate(&self, threads: usize, lasts: Duration) -> Result<f64, Failed> {
        if self.with_mail {
            self.chains.mailed_rate(threads, lasts).await
        } else {
            self.chains.rate(threads, lasts).await
        }
    }
}

/// The threads at a time that `ARTEL_BENCH_THREADS` asks for, such as `1,16`; all of them when it is not set.
fn threads() -> Result<Vec<usize>, Failed> {
    let all = THREADS.into_iter().chain([CROWD]);
    let Ok(text) = std::env::var("ARTEL_BENCH_THREADS") else {
        return Ok(all.collect());
    };
    let wanted: Vec<&str> = text.split(',').map(str::trim).collect();
    let chosen: Vec<_> = all
        .filter(|threads| wanted.contains(&&*threads.to_string()))
        .collect();
    if chosen.len() < wanted.len() {
        return Err(format!("ARTEL_BENCH_THREADS is {text:?}; it has to be some of {THREADS:?} and {CROWD}, with commas between them").into());
    }
    Ok(chosen)
}

async fn measure(databases: &[Database], rounds: u32, lasts: Duration) -> Result<Rates, Failed> {
    let wanted = threads()?;
    let url = databases.iter().find_map(Database::url);
    let limit = CommitLimit::on(url.ok_or("pgbench needs PostgreSQL")?).await?;
    let mut contestants = Vec::new();
    for database in databases {
        let chains = Chains::on(database.store.clone()).await?;
        for with_mail in [false, true] {
            let kind = if with_mail { "mailed" } else { "plain" };
            contestants.push(Contestant {
                name: format!("{kind}.{}", database.name),
                chains: chains.clone(),
                with_mail,
                crowded: database.url().is_some(),
            });
        }
    }
    contestants.retain(|contestant| chosen(&contestant.name));
    for contestant in &contestants {
        contestant.rate(2, Duration::from_millis(300)).await?;
    }
    let mut rates = Rates::new();
    for round in 1..=rounds {
        for &threads in &wanted {
            let crowd = threads == CROWD;
            if !crowd {
                let rate = limit.rate(threads, lasts).await?;
                let key = (COMMITS.to_owned(), threads);
                rates.entry(key).or_default().push(rate);
            }
            for contestant in &contestants {
                if contestant.crowded || !crowd {
                    let rate = contestant.rate(threads, lasts).await?;
                    let key = (contestant.name.clone(), threads);
                    rates.entry(key).or_default().push(rate);
                }
            }
        }
        eprintln!("round {round} of {rounds} is done");
    }
    Ok(rates)
}

fn print(rates: &Rates) {
    println!(
        "chain of {NODES} nodes, supersteps/s, medians; beside them pgbench's one-row commits/s"
    );
    let mut names: Vec<&str> = rates.keys().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    print!("{:>8}", "threads");
    for name in &names {
        print!(" {name:>15}");
    }
    println!();
    for threads in THREADS.into_iter().chain([CROWD]) {
        print!("{threads:>8}");
        for name in &names {
            let rates = rates.get(&((*name).to_owned(), threads));
            let cell =
                rates.map_or_else(|| "-".to_owned(), |rates| format!("{:.0}", median(rates)));
            print!(" {cell:>15}");
        }
        println!();
    }
}

fn report(rates: &Rates, report: &mut Report) {
    for ((name, threads), rates) in rates {
        let (name, unit) = match name.split_once('.') {
            Some(("plain", database)) => {
                (format!("engine.chain.{database}.{threads}"), "supersteps/s")
            }
            Some((_, database)) => (
                format!("engine.mailed_chain.{database}.{threads}"),
                "supersteps/s",
            ),
            None => (format!("pgbench.one_row_commits.{threads}"), "commits/s"),
        };
        report.rounds(name, unit, rates);
    }
    for (contestant, name, with) in [
        ("plain.postgres", "chain", ""),
        (
            "mailed.postgres",
            "mailed_chain",
            " with a signal and an event each",
        ),
    ] {
        for (threads, clients, plain, mailed) in PROMISES {
            let (Some(steps), Some(commits)) = (
                rates.get(&(contestant.to_owned(), threads)),
                rates.get(&(COMMITS.to_owned(), clients)),
            ) else {
                continue;
            };
            let limit = if with.is_empty() { plain } else { mailed };
            let share = 100.0 * median_ratio(steps, commits);
            report.promise(
                format!("engine.{name}.share_of_commits.{threads}"),
                format!("supersteps{with} on PostgreSQL, {threads} threads at a time, as a share of one-row commits of {clients} clients"),
                "%",
                Bound::AtLeast(limit),
                share,
            );
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let rounds = setting("ARTEL_BENCH_ROUNDS", 5)?.max(1);
    let seconds = setting("ARTEL_BENCH_SECONDS", 2)?.max(1);
    let postgres = Database::postgres().await;
    let mut found = Report::default();
    found.about(
        "postgres",
        server(postgres.url().unwrap_or_default()).await?,
    );
    let databases = [postgres, Database::sqlite().await, Database::memory()];
    let rates = measure(&databases, rounds, Duration::from_secs(seconds.into())).await?;
    print(&rates);
    report(&rates, &mut found);
    found.finish()
}
