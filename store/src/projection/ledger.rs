//! The table of what was spent.

use ports::Spend;

use super::Fold;
use crate::Result;
use crate::db::{insert_new, int, val};

/// One line; the same spending twice is one line.
pub(super) async fn line(fold: &mut Fold<'_>, spend: &Spend) -> Result<()> {
    let columns = vec![
        ("id", val(spend.id.as_str())),
        ("project", val(spend.project.as_str())),
        ("job", val(spend.job.as_ref().map(ToString::to_string))),
        ("task", val(spend.task.as_ref().map(ToString::to_string))),
        ("role", val(spend.role.as_str())),
        ("model", val(spend.model.as_str())),
        ("input_tokens", int(spend.usage.input_tokens)),
        ("output_tokens", int(spend.usage.output_tokens)),
        ("cost_usd", val(spend.usage.cost_usd)),
        ("spent_ms", val(fold.at_ms)),
    ];
    fold.tx.execute(&insert_new("ledger", columns)).await?;
    Ok(())
}
