//! The limit of a PostgreSQL server: how many one-row commits a second `pgbench` makes on it.

use std::{path::PathBuf, process::Stdio, time::Duration};

use super::{Failed, PATIENCE};

/// One-row commits, each a transaction of its own.
pub struct CommitLimit {
    program: PathBuf,
    script: PathBuf,
    url: String,
}

impl CommitLimit {
    pub async fn on(url: &str) -> Result<Self, Failed> {
        let pool = sqlx::PgPool::connect(url).await?;
        sqlx::raw_sql(include_str!("../commit_limit_table.sql"))
            .execute(&pool)
            .await?;
        pool.close().await;
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/commit_limit.sql");
        Ok(Self {
            program: pgbench(),
            script,
            url: url.to_owned(),
        })
    }

    /// Commits a second, with so many clients.
    pub async fn rate(&self, clients: usize, lasts: Duration) -> Result<f64, Failed> {
        let run = tokio::process::Command::new(&self.program)
            .args(["--no-vacuum", "--protocol=prepared", "--jobs=2"])
            .arg(format!("--client={clients}"))
            .arg(format!("--time={}", lasts.as_secs().max(1)))
            .arg("--file")
            .arg(&self.script)
            .arg(&self.url)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(lasts + PATIENCE, run)
            .await
            .map_err(|_| "pgbench does not end")?
            .map_err(|error| format!("{} cannot be run: {error}", self.program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let rate = text
            .lines()
            .find_map(|line| line.strip_prefix("tps = "))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|number| number.parse().ok());
        match rate {
            Some(rate) if output.status.success() => Ok(rate),
            _ => Err(format!(
                "pgbench ({}) said: {text}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            )
            .into()),
        }
    }
}

/// On the path, or where Debian keeps the programs of a server.
fn pgbench() -> PathBuf {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin/pgbench")))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| PathBuf::from("pgbench"))
}
