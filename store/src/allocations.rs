//! Things that only one project can have, unique by constraint at the moment they are given.

use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::ops::RangeInclusive;

use async_trait::async_trait;
use ports::{Allocations, ProjectId};
use sea_query::{Expr, ExprTrait as _, Query};

use crate::db::{insert_new, val};
use crate::{Error, Result, Store};

/// Gives ports of this machine to projects.
#[derive(Clone, Debug)]
pub struct Ports {
    store: Store,
    range: RangeInclusive<u16>,
}

impl Ports {
    /// The range that is used when the configuration names none.
    pub const DEFAULT_RANGE: RangeInclusive<u16> = 20_000..=29_999;

    /// Gives ports out of a range.
    pub fn new(store: &Store, range: RangeInclusive<u16>) -> Self {
        Self {
            store: store.clone(),
            range,
        }
    }

    async fn current(&self, project: &ProjectId) -> Result<Option<u16>> {
        let query = Query::select()
            .column("value")
            .from("allocations")
            .and_where(Expr::col("kind").eq("port"))
            .and_where(Expr::col("project").eq(project.as_str()))
            .take();
        let Some(row) = self.store.db.fetch_optional(&query).await? else {
            return Ok(None);
        };
        let text = row.text("value")?;
        text.parse().map(Some).map_err(|_| Error::Unreadable {
            column: "value",
            value: text,
        })
    }

    async fn taken(&self) -> Result<Vec<u16>> {
        let query = Query::select()
            .column("value")
            .from("allocations")
            .and_where(Expr::col("kind").eq("port"))
            .take();
        let rows = self.store.db.fetch_all(&query).await?;
        Ok(rows
            .iter()
            .filter_map(|row| row.text("value").ok()?.parse().ok())
            .collect())
    }

    async fn allocate(&self, project: &ProjectId, avoid: Option<u16>) -> Result<u16> {
        if let Some(port) = self.current(project).await? {
            if avoid != Some(port) {
                return Ok(port);
            }
            // Only the port that is to be avoided: another process may have moved on already.
            let give_back = Query::delete()
                .from_table("allocations")
                .and_where(Expr::col("kind").eq("port"))
                .and_where(Expr::col("project").eq(project.as_str()))
                .and_where(Expr::col("value").eq(port.to_string()))
                .take();
            self.store.db.execute(&give_back).await?;
        }
        let (first, last) = (*self.range.start(), *self.range.end());
        let taken = self.taken().await?;
        // On from the port that is to be avoided, and around, so that the next one to avoid is not the last one again.
        let from = avoid.filter(|a| self.range.contains(a)).unwrap_or(first);
        let candidates = (from..=last)
            .chain(first..from)
            .filter(|port| avoid != Some(*port) && !taken.contains(port));
        for port in candidates {
            if !free(port).await {
                continue;
            }
            let columns = vec![
                ("kind", val("port")),
                ("value", val(port.to_string())),
                ("project", val(project.as_str())),
                ("allocated_ms", self.store.db.now_ms()),
            ];
            if self
                .store
                .db
                .execute(&insert_new("allocations", columns))
                .await?
                == 1
            {
                return Ok(port);
            }
            // Another process took this port, or gave this project one.
            if let Some(theirs) = self.current(project).await?
                && avoid != Some(theirs)
            {
                return Ok(theirs);
            }
        }
        Err(Error::NoPort { first, last })
    }
}

/// Whether nothing on this machine listens on a port at the moment, on any address.
async fn free(port: u16) -> bool {
    let bind = move || {
        let v4 = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port));
        let local = v4.is_ok();
        drop(v4);
        // A machine without IPv6 refuses the address, which says nothing about the port.
        let v6 = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
            Ok(_) => true,
            Err(error) => error.kind() != std::io::ErrorKind::AddrInUse,
        };
        local && v6
    };
    tokio::task::spawn_blocking(bind).await.unwrap_or(false)
}

#[async_trait]
impl Allocations for Ports {
    async fn port(&self, project: &ProjectId, avoid: Option<u16>) -> ports::Result<u16> {
        Ok(self.allocate(project, avoid).await?)
    }

    async fn release(&self, project: &ProjectId) -> ports::Result<()> {
        let everything = Query::delete()
            .from_table("allocations")
            .and_where(Expr::col("project").eq(project.as_str()))
            .take();
        self.store
            .db
            .execute(&everything)
            .await
            .map_err(ports::Failure::from)?;
        Ok(())
    }
}
