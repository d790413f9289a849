//! Deleting threads, and cleaning up behind those that were deleted.

use sqlx::{PgConnection, Postgres, QueryBuilder, Row};

use super::OLDEST;
use crate::{
    checkpoint::{BATCH, DeleteFilter, SurveyFilter, Surveyed},
    ids::ThreadId,
    postgres::{
        rows::{status_of_thread, string, wide},
        threads,
        values::{plain, text},
    },
    stored::{self, Fault, int, micros, status_code, status_from},
};

/// Narrows a query to graphs and to a prefix of ids.
fn choose(query: &mut QueryBuilder<Postgres>, graphs: &[String], prefix: Option<&str>) {
    if !graphs.is_empty() {
        let graphs: Vec<String> = graphs.iter().map(|name| text(name).into_owned()).collect();
        query
            .push(" and t.graph = any (")
            .push_bind(graphs)
            .push(")");
    }
    if let Some(prefix) = prefix {
        threads::with_prefix(query, prefix);
    }
}

/// Deletes the threads that a filter means; those that somebody else has locked are left for the next time. Their other rows are
/// garbage from now on. In one statement.
pub(super) async fn delete(
    db: &mut PgConnection,
    filter: &DeleteFilter,
    limit: usize,
) -> Result<Vec<ThreadId>, Fault> {
    let codes: Vec<i16> = filter.statuses().into_iter().map(status_code).collect();
    let mut query: QueryBuilder<Postgres> = QueryBuilder::new(concat!(
        "with chosen as (select t.thread from graph_thread t where (t.status < 3 or t.due_at is null) and ",
        status_of_thread!(),
        " = any ("
    ));
    query.push_bind(codes).push(")");
    choose(&mut query, &filter.graphs, filter.prefix.as_deref());
    if let Some(age) = filter.unchanged_for {
        query
            .push(" and t.updated_at < now() - interval '1 microsecond' * ")
            .push_bind(micros(age).min(OLDEST));
    }
    query
        .push(" order by t.id limit ")
        .push_bind(stored::rows(limit))
        .push(
            " for update of t skip locked), gone as ( \
             delete from graph_thread t using chosen c where t.thread = c.thread returning t.thread, t.id \
         ), garbage as (insert into graph_garbage (thread) select thread from gone) \
         select id from gone order by id",
        );
    let found: Vec<String> = query.build_query_scalar().fetch_all(db).await?;
    Ok(found
        .into_iter()
        .map(|id| ThreadId::from(plain(id)))
        .collect())
}

pub(super) async fn survey(
    db: &mut PgConnection,
    filter: &SurveyFilter,
) -> Result<Vec<Surveyed>, Fault> {
    let mut query: QueryBuilder<Postgres> = QueryBuilder::new(concat!(
        "select t.id, t.graph, ",
        status_of_thread!(),
        ", t.last_checkpoint - coalesce(t.horizon, 1) + 1 from graph_thread t where true"
    ));
    choose(&mut query, &filter.graphs, filter.prefix.as_deref());
    if let Some(after) = &filter.after {
        query
            .push(" and t.id > ")
            .push_bind(text(after.as_str()).into_owned());
    }
    query
        .push(" order by t.id limit ")
        .push_bind(stored::rows(filter.limit));
    let rows = query.build().fetch_all(db).await?;
    rows.iter()
        .map(|row| {
            Ok(Surveyed {
                id: string(row, 0)?.into(),
                graph: string(row, 1)?,
                status: status_from(row.try_get::<i16, _>(2)?.into())?,
                checkpoints: wide(row, 3)?,
            })
        })
        .collect()
}

/// In the caller's transaction. What somebody else collects at the same time is left to them.
pub(super) async fn collect(db: &mut PgConnection, thread: Option<i64>) -> Result<bool, Fault> {
    let mut room = stored::rows(BATCH);
    loop {
        let next: Option<i64> = sqlx::query_scalar(
            "select thread from graph_garbage where $1::bigint is null or thread = $1 \
             order by thread limit 1 for update skip locked",
        )
        .bind(thread)
        .fetch_optional(&mut *db)
        .await?;
        let Some(next) = next else {
            return Ok(false);
        };
        for delete in [
            "delete from graph_checkpoint where thread = $1 and number = any \
             (array(select number from graph_checkpoint where thread = $1 limit $2))",
            "delete from graph_write where ctid = any \
             (array(select ctid from graph_write where thread = $1 limit $2))",
            "delete from graph_signal where thread = $1 and digest = any \
             (array(select digest from graph_signal where thread = $1 limit $2))",
            "delete from graph_branch where thread = $1 and branch = any \
             (array(select branch from graph_branch where thread = $1 limit $2))",
        ] {
            let gone = sqlx::query(delete)
                .bind(next)
                .bind(room)
                .execute(&mut *db)
                .await?
                .rows_affected();
            room -= int(gone);
            if room <= 0 {
                return Ok(true);
            }
        }
        sqlx::query("delete from graph_garbage where thread = $1")
            .bind(next)
            .execute(&mut *db)
            .await?;
    }
}
