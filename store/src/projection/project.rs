//! The table of projects.

use ports::{PersonId, ProjectId, ProjectSpec, Slug};
use sea_query::{Asterisk, Expr, ExprTrait as _, Query};

use super::Fold;
use crate::Result;
use crate::db::{upsert, val};

/// A row of `projects`.
pub(super) struct Project {
    pub(super) id: String,
    pub(super) slug: String,
    pub(super) name: String,
    pub(super) goal: String,
    pub(super) owner: Option<String>,
    pub(super) approved: bool,
    /// `stopped`, `removed`, `archived`, or nothing.
    pub(super) hold: String,
    pub(super) status: String,
    pub(super) url: Option<String>,
    pub(super) repository: Option<String>,
    pub(super) port: Option<i64>,
    pub(super) limit_usd: Option<f64>,
    pub(super) limit_tokens: Option<i64>,
    pub(super) founded_ms: i64,
}

pub(super) async fn load(fold: &mut Fold<'_>, project: &ProjectId) -> Result<Option<Project>> {
    let query = Query::select()
        .column(Asterisk)
        .from("projects")
        .and_where(Expr::col("id").eq(project.as_str()))
        .take();
    let Some(row) = fold.tx.fetch_optional(&query).await? else {
        return Ok(None);
    };
    Ok(Some(Project {
        id: row.text("id")?,
        slug: row.text("slug")?,
        name: row.text("name")?,
        goal: row.text("goal")?,
        owner: row.opt_text("owner")?,
        approved: row.flag("approved")?,
        hold: row.text("hold")?,
        status: row.text("status")?,
        url: row.opt_text("url")?,
        repository: row.opt_text("repository")?,
        port: row.opt_int("port")?,
        limit_usd: row.opt_double("limit_usd")?,
        limit_tokens: row.opt_int("limit_tokens")?,
        founded_ms: row.int("founded_ms")?,
    }))
}

impl Project {
    pub(super) async fn save(self, fold: &mut Fold<'_>) -> Result<()> {
        let columns = vec![
            ("id", val(self.id)),
            ("slug", val(self.slug)),
            ("name", val(self.name)),
            ("goal", val(self.goal)),
            ("owner", val(self.owner)),
            ("approved", val(self.approved)),
            ("hold", val(self.hold)),
            ("status", val(self.status)),
            ("url", val(self.url)),
            ("repository", val(self.repository)),
            ("port", val(self.port)),
            ("limit_usd", val(self.limit_usd)),
            ("limit_tokens", val(self.limit_tokens)),
            ("founded_ms", val(self.founded_ms)),
            ("changed_ms", val(fold.at_ms)),
        ];
        fold.tx
            .execute(&upsert("projects", &["id"], columns))
            .await?;
        Ok(())
    }
}

/// The project, made as a draft by the first event that names it.
pub(super) async fn ensure(fold: &mut Fold<'_>, project: &ProjectId) -> Result<()> {
    if load(fold, project).await?.is_some() {
        return Ok(());
    }
    let slug = unique_slug(fold, project, project.as_str()).await?;
    Project {
        id: project.to_string(),
        slug,
        name: project.to_string(),
        goal: String::new(),
        owner: None,
        approved: false,
        hold: String::new(),
        status: "draft".to_owned(),
        url: None,
        repository: None,
        port: None,
        limit_usd: None,
        limit_tokens: None,
        founded_ms: fold.at_ms,
    }
    .save(fold)
    .await
}

async fn change(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    change: impl FnOnce(&mut Project),
) -> Result<()> {
    if let Some(mut row) = load(fold, project).await? {
        change(&mut row);
        row.save(fold).await?;
    }
    Ok(())
}

pub(super) async fn founded(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    owner: &PersonId,
) -> Result<()> {
    let at_ms = fold.at_ms;
    change(fold, project, |row| {
        row.owner.get_or_insert_with(|| owner.to_string());
        row.founded_ms = Ord::min(row.founded_ms, at_ms);
    })
    .await
}

pub(super) async fn specified(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    slug: &str,
    spec: &ProjectSpec,
) -> Result<()> {
    let wanted = Slug::parse(slug).unwrap_or_else(|_| Slug::from_title(&spec.name));
    let slug = unique_slug(fold, project, wanted.as_str()).await?;
    change(fold, project, |row| {
        row.slug = slug;
        spec.name.clone_into(&mut row.name);
        spec.goal.clone_into(&mut row.goal);
        row.approved = true;
    })
    .await
}

pub(super) async fn port(fold: &mut Fold<'_>, project: &ProjectId, port: u16) -> Result<()> {
    change(fold, project, |row| row.port = Some(i64::from(port))).await
}

pub(super) async fn repository(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    location: &str,
) -> Result<()> {
    change(fold, project, |row| {
        row.repository = Some(location.to_owned());
    })
    .await
}

pub(super) async fn budget(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    limit_usd: Option<f64>,
    limit_tokens: Option<u64>,
) -> Result<()> {
    change(fold, project, |row| {
        if limit_usd.is_some() {
            row.limit_usd = limit_usd;
        }
        if let Some(tokens) = limit_tokens {
            row.limit_tokens = Some(i64::try_from(tokens).unwrap_or(i64::MAX));
        }
    })
    .await
}

/// Sets what holds the service back; a removed one also gives its port back.
pub(super) async fn hold(fold: &mut Fold<'_>, project: &ProjectId, hold: &str) -> Result<()> {
    change(fold, project, |row| {
        hold.clone_into(&mut row.hold);
        if hold == "removed" {
            row.port = None;
        }
    })
    .await
}

/// `wanted`, `wanted-2`, `wanted-3`, …, none longer than a slug may be.
pub(crate) fn slug_candidates(wanted: &str) -> impl Iterator<Item = String> + '_ {
    std::iter::once(wanted.to_owned()).chain((2..10_000).map(move |number| {
        let suffix = format!("-{number}");
        let kept: String = wanted.chars().take(40 - suffix.len()).collect();
        format!("{}{suffix}", kept.trim_end_matches('-'))
    }))
}

/// The first candidate that is no other project's slug or id. The conversation asked for a free one before; two
/// projects that got the same answer are told apart here, in the journal's order.
async fn unique_slug(fold: &mut Fold<'_>, project: &ProjectId, wanted: &str) -> Result<String> {
    for candidate in slug_candidates(wanted) {
        let query = Query::select()
            .column("id")
            .from("projects")
            .and_where(
                Expr::col("slug")
                    .eq(candidate.as_str())
                    .or(Expr::col("id").eq(candidate.as_str())),
            )
            .and_where(Expr::col("id").ne(project.as_str()))
            .limit(1)
            .take();
        if fold.tx.fetch_optional(&query).await?.is_none() {
            return Ok(candidate);
        }
    }
    Err(crate::Error::NoSlug(wanted.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_numbered_slug_is_still_a_slug() {
        let long = "a".repeat(40);
        for wanted in ["notes", "a-very-long-name-that-goes-on-and-on-an-x", &long] {
            for candidate in slug_candidates(wanted).take(200) {
                if candidate.len() <= 40 {
                    assert!(Slug::parse(&candidate).is_ok(), "{candidate}");
                }
            }
        }
        assert_eq!(
            slug_candidates("notes").take(3).collect::<Vec<_>>(),
            ["notes", "notes-2", "notes-3"]
        );
    }
}
