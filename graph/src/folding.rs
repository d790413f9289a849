//! What the database checkpointers share about pruning: which rows of forgotten checkpoints can go, and which must be kept
//! together for what they appended.
//!
//! A forgotten checkpoint needs no state of its own any more, because the oldest of those that stay has a snapshot. But the
//! items of append channels are stored once, in the row of the step that appended them, so these rows stay for as long as a
//! branch leads over them. They are put together, so that a long history of small steps becomes a few rows: each at most
//! [`CHUNK`] bytes, so that no row is rewritten over and over, and none across a fork, whose branch needs only what is
//! before it.

use std::collections::BTreeMap;

use crate::stored::{Fork, lineage};

/// The most bytes of appended items that are put together in one row.
pub(crate) const CHUNK: u64 = 64 * 1024;

/// A forgotten row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Old {
    pub branch: u32,
    pub number: u64,
    /// How large its appended items are, if it has any.
    pub bytes: Option<u64>,
}

/// What becomes of forgotten rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Folding {
    /// Nobody needs them.
    pub unneeded: Vec<u64>,
    /// Rows to put together, oldest first: the last one takes the place of all.
    pub chunks: Vec<Vec<u64>>,
}

/// Decides about forgotten rows, which come in the order of their branches and numbers: for each branch the oldest ones that
/// are left, perhaps after the newest chunk there is. `branches` says how many branches there are, `gone` which of them are
/// not.
pub(crate) fn fold(rows: &[Old], branches: u32, forks: &[Fork], gone: &[u32]) -> Folding {
    // Up to where the branches that are left lead over each.
    let mut needed: BTreeMap<u32, u64> = BTreeMap::new();
    for branch in (0..branches).filter(|branch| !gone.contains(branch)) {
        for segment in lineage(forks, branch, u64::MAX) {
            let upto = needed.entry(segment.branch).or_default();
            *upto = segment.upto.max(*upto);
        }
    }
    let forked_between = |branch, from, to| {
        forks
            .iter()
            .any(|fork| fork.from_branch == branch && (from..to).contains(&fork.checkpoint))
    };
    let mut folding = Folding::default();
    let mut open: Option<(Old, u64)> = None;
    for row in rows {
        let upto = needed.get(&row.branch).copied().unwrap_or(0);
        let Some(bytes) = row.bytes.filter(|_| row.number <= upto) else {
            folding.unneeded.push(row.number);
            continue;
        };
        let joins = open.is_some_and(|(last, sum)| {
            last.branch == row.branch
                && sum + bytes <= CHUNK
                && !forked_between(row.branch, last.number, row.number)
        });
        match folding.chunks.last_mut() {
            Some(chunk) if joins => {
                chunk.push(row.number);
                open = open.map(|(_, sum)| (*row, sum + bytes));
            }
            _ => {
                folding.chunks.push(vec![row.number]);
                open = Some((*row, bytes));
            }
        }
    }
    folding
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(branch: u32, number: u64, bytes: impl Into<Option<u64>>) -> Old {
        Old {
            branch,
            number,
            bytes: bytes.into(),
        }
    }

    #[test]
    fn rows_that_appended_nothing_go_and_the_others_are_put_together() {
        let rows = [row(0, 1, 10), row(0, 2, None), row(0, 3, 10)];
        let folding = fold(&rows, 1, &[], &[]);
        assert_eq!(folding.unneeded, [2]);
        assert_eq!(folding.chunks, [[1, 3]]);
    }

    #[test]
    fn chunks_do_not_grow_for_ever() {
        let rows = [
            row(0, 1, CHUNK - 1),
            row(0, 2, 1),
            row(0, 3, 1),
            row(0, 4, 2 * CHUNK),
        ];
        let folding = fold(&rows, 1, &[], &[]);
        assert_eq!(folding.chunks, [vec![1, 2], vec![3], vec![4]]);
    }

    #[test]
    fn what_a_fork_needs_is_not_put_together_with_what_it_must_not_see() {
        let forks = [Fork {
            branch: 1,
            from_branch: 0,
            checkpoint: 2,
        }];
        let rows = [row(0, 1, 1), row(0, 2, 1), row(0, 3, 1), row(0, 4, 1)];
        let both = fold(&rows, 2, &forks, &[]);
        assert_eq!(both.chunks, [[1, 2], [3, 4]]);
        // When the first branch is gone, the second one still needs what it grew from.
        let second = fold(&rows, 2, &forks, &[0]);
        assert_eq!(
            (second.chunks, second.unneeded),
            (vec![vec![1, 2]], vec![3, 4])
        );
        let first = fold(&rows, 2, &forks, &[1]);
        assert_eq!(first.unneeded, [0; 0]);
    }

    #[test]
    fn branches_are_not_mixed() {
        let forks = [Fork {
            branch: 1,
            from_branch: 0,
            checkpoint: 1,
        }];
        let rows = [row(0, 1, 1), row(1, 2, 1)];
        assert_eq!(fold(&rows, 2, &forks, &[]).chunks, [[1], [2]]);
    }
}
