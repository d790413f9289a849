//! What the databases that are asked in SQL have in common when they look for documents: the shape of a search. How a value is
//! found in a document and compared is each one's own.

use sqlx::{Database, Encode, QueryBuilder, Type};

use super::{Condition, MAX_RESULTS, Namespace, Order, Scalar, Search, Test};
use crate::stored::rows;

/// What a row of a document holds, in the order in which it is read.
pub(crate) const COLUMNS: &str = "d.path, d.key, d.value, d.created_at, d.updated_at, d.expires_at";

/// How a database finds what stands at a path of a document, and compares it.
pub(crate) trait Dialect: Database {
    /// Adds something that is not null if anything stands at the path of a condition.
    fn stands(query: &mut QueryBuilder<Self>, condition: &Condition);

    /// Adds a `case` over the type of what stands there, up to the first `when`.
    fn case(query: &mut QueryBuilder<Self>, condition: &Condition);

    /// Adds the `when` for a value of the type of `with`, which is not null.
    fn when(
        query: &mut QueryBuilder<Self>,
        condition: &Condition,
        operator: &'static str,
        with: &Scalar,
    );

    /// A text as the database holds it.
    fn spelled(text: String) -> String;
}

/// Narrows a query to a prefix of namespaces.
pub(crate) fn push_prefix<DB: Dialect>(query: &mut QueryBuilder<DB>, prefix: &Namespace)
where
    String: for<'q> Encode<'q, DB> + Type<DB>,
{
    if let Some(end) = prefix.path_after() {
        query
            .push(" and d.path >= ")
            .push_bind(DB::spelled(prefix.path()))
            .push(" and d.path < ")
            .push_bind(DB::spelled(end));
    }
}

/// Adds the conditions, the order and the page of a search to a query that has its `where` already.
pub(crate) fn push_search<DB: Dialect>(query: &mut QueryBuilder<DB>, search: &Search)
where
    i64: for<'q> Encode<'q, DB> + Type<DB>,
{
    for condition in search.filter.conditions() {
        query.push(" and ");
        push_condition(query, condition);
    }
    query.push(match search.order {
        Order::NewestFirst => " order by d.updated_at desc, d.path, d.key",
        Order::OldestFirst => " order by d.updated_at, d.path, d.key",
        Order::Key => " order by d.path, d.key",
    });
    push_page(query, search.limit.min(MAX_RESULTS), search.offset);
}

pub(crate) fn push_page<DB: Database>(query: &mut QueryBuilder<DB>, limit: usize, offset: usize)
where
    i64: for<'q> Encode<'q, DB> + Type<DB>,
{
    query
        .push(" limit ")
        .push_bind(rows(limit))
        .push(" offset ")
        .push_bind(rows(offset));
}

fn push_condition<DB: Dialect>(query: &mut QueryBuilder<DB>, condition: &Condition) {
    let (operator, with) = match &condition.test {
        Test::Eq(with) => ("=", with),
        Test::Ne(with) => ("<>", with),
        Test::Gt(with) => (">", with),
        Test::Gte(with) => (">=", with),
        Test::Lt(with) => ("<", with),
        Test::Lte(with) => ("<=", with),
        Test::In(choices) => {
            query.push("(false");
            for with in choices {
                query.push(" or ");
                compare(query, condition, "=", with);
            }
            query.push(")");
            return;
        }
        Test::Exists(exists) => {
            DB::stands(query, condition);
            query.push(if *exists { " is not null" } else { " is null" });
            return;
        }
    };
    compare(query, condition, operator, with);
}

/// What is of another type than what it is compared with is not found, whatever the operator.
fn compare<DB: Dialect>(
    query: &mut QueryBuilder<DB>,
    condition: &Condition,
    operator: &'static str,
    with: &Scalar,
) {
    DB::case(query, condition);
    if matches!(with, Scalar::Null) {
        let holds = operator.contains('=');
        query
            .push(" when 'null' then ")
            .push(if holds { "true" } else { "false" });
    } else {
        DB::when(query, condition, operator, with);
    }
    query.push(" else false end");
}

/// The path of a condition as JSON paths are written: fields of objects, and nothing else. No name has a quote in it.
pub(crate) fn json_path(condition: &Condition) -> String {
    let mut path = "$".to_owned();
    for name in condition.path.fields() {
        path.push_str(".\"");
        path.push_str(name);
        path.push('"');
    }
    path
}
