//! A look at all that is stored, whatever tables there are, and the way back to an earlier moment.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, SqliteConnection};

/// Numbers that mean nothing but which row it is: a rolled back transaction may use some up.
const SURROGATES: [&str; 4] = ["thread", "stream", "cursor", "token"];

/// Everything that is stored, in one order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dump {
    /// To the letter.
    pub exact: Vec<String>,
    /// Without times, and with surrogate numbers replaced by their rank.
    pub shape: Vec<String>,
}

impl Dump {
    fn of(mut rows: Vec<(String, Map<String, Value>)>) -> Self {
        let thread = |row: &Map<String, Value>| row.get("thread").and_then(Value::as_i64);
        // Nobody can see what is left of deleted threads; it is cleared away when there is time.
        let garbage: BTreeSet<i64> = rows
            .iter()
            .filter(|(table, _)| table == "graph_garbage")
            .filter_map(|(_, row)| thread(row))
            .collect();
        rows.retain(|(_, row)| thread(row).is_none_or(|thread| !garbage.contains(&thread)));
        let mut numbers: BTreeMap<&str, BTreeSet<i64>> = BTreeMap::new();
        for (_, row) in &rows {
            for name in SURROGATES {
                if let Some(number) = row.get(name).and_then(Value::as_i64) {
                    numbers.entry(name).or_default().insert(number);
                }
            }
        }
        let shape = |row: &Map<String, Value>| -> Map<String, Value> {
            let mask = |(name, value): (&String, &Value)| {
                let is_time = name == "at" || name.ends_with("_at");
                let value = match value {
                    Value::Null => Value::Null,
                    _ if is_time => Value::from("a time"),
                    value => value
                        .as_i64()
                        .and_then(|number| {
                            numbers
                                .get(name.as_str())?
                                .iter()
                                .position(|n| *n == number)
                        })
                        .map_or_else(|| value.clone(), Value::from),
                };
                (name.clone(), value)
            };
            row.iter().map(mask).collect()
        };
        let text = |table: &str, row: Map<String, Value>| format!("{table} {}", Value::Object(row));
        let mut shapes: Vec<String> = rows.iter().map(|(t, row)| text(t, shape(row))).collect();
        let mut exact: Vec<String> = rows.into_iter().map(|(t, row)| text(&t, row)).collect();
        shapes.sort();
        exact.sort();
        Self {
            exact,
            shape: shapes,
        }
    }
}

/// Whether what was done has landed as a whole; if it has not, everything must be as before.
pub fn has_landed(at: &str, before: &Dump, after: &Dump, new: &[String]) -> bool {
    if after.exact == before.exact {
        return false;
    }
    same(at, &after.shape, new);
    true
}

/// Says what differs, and only that.
pub fn same(at: &str, found: &[String], expected: &[String]) {
    let without = |a: &[String], b: &[String]| -> Vec<String> {
        a.iter().filter(|row| !b.contains(row)).cloned().collect()
    };
    assert!(
        found == expected,
        "{at}: what is there is not what should be there\nthere: {:#?}\nmissing: {:#?}",
        without(found, expected),
        without(expected, found)
    );
}

/// The tables of the checkpointer, with the columns that can be written.
type Tables = Vec<(String, Vec<String>)>;

fn quoted(columns: &[String]) -> String {
    columns.join(", ")
}

/// A connection of its own to a PostgreSQL database, past whatever fails.
pub struct Postgres {
    pub connection: PgConnection,
    tables: Tables,
}

impl Postgres {
    pub async fn look(url: &str) -> Self {
        let mut connection = PgConnection::connect(url).await.expect("connects");
        sqlx::raw_sql("set synchronous_commit = off")
            .execute(&mut connection)
            .await
            .expect("is set");
        let columns: Vec<(String, String)> = sqlx::query_as(
            "select table_name::text, column_name::text from information_schema.columns \
             where table_schema = current_schema() and table_name like 'graph\\_%' and table_name <> 'graph_migrations' \
                 and is_generated = 'NEVER' order by table_name, ordinal_position",
        )
        .fetch_all(&mut connection)
        .await
        .expect("columns");
        Self {
            connection,
            tables: by_table(columns),
        }
    }

    pub fn tables(&self) -> impl Iterator<Item = &str> {
        self.tables.iter().map(|(table, _)| table.as_str())
    }

    async fn run(&mut self, sql: String) {
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut self.connection)
            .await
            .expect("runs");
    }

    pub async fn save(&mut self) {
        let sql: Vec<String> = self
            .tables()
            .map(|table| format!("create table saved_{table} as table {table}"))
            .collect();
        self.run(sql.join("; ")).await;
    }

    pub async fn restore(&mut self) {
        let mut sql = "begin; ".to_owned();
        for (table, columns) in &self.tables {
            let columns = quoted(columns);
            sql.extend([
                format!("delete from {table}; "),
                format!("insert into {table} ({columns}) overriding system value select {columns} from saved_{table}; "),
            ]);
        }
        self.run(sql + "commit").await;
    }

    pub async fn dump(&mut self) -> Dump {
        let sql: Vec<String> = self
            .tables()
            .map(|table| format!("select '{table}', to_jsonb(t) from {table} t"))
            .collect();
        let rows = sqlx::query(AssertSqlSafe(sql.join(" union all ")))
            .fetch_all(&mut self.connection)
            .await
            .expect("rows");
        Dump::of(
            rows.iter()
                .map(|row| (row.get(0), object(row.get(1))))
                .collect(),
        )
    }
}

/// The same for an SQLite file.
pub struct Sqlite {
    pub connection: SqliteConnection,
    tables: Tables,
}

impl Sqlite {
    pub async fn look(path: &std::path::Path) -> Self {
        let mut connection = SqliteConnection::connect(&format!("sqlite://{}", path.display()))
            .await
            .expect("opens");
        sqlx::raw_sql("pragma synchronous = off")
            .execute(&mut connection)
            .await
            .expect("is set");
        let columns: Vec<(String, String)> = sqlx::query_as(
            "select m.name, c.name from sqlite_schema m join pragma_table_info(m.name) c \
             where m.type = 'table' and m.name like 'graph\\_%' escape '\\' and m.name <> 'graph_migrations' order by m.name, c.cid",
        )
        .fetch_all(&mut connection)
        .await
        .expect("columns");
        Self {
            connection,
            tables: by_table(columns),
        }
    }

    async fn run(&mut self, sql: String) {
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut self.connection)
            .await
            .expect("runs");
    }

    pub async fn save(&mut self) {
        let sql: Vec<String> = self
            .tables
            .iter()
            .map(|(table, _)| format!("create table saved_{table} as select * from {table}"))
            .collect();
        self.run(sql.join("; ")).await;
    }

    pub async fn restore(&mut self) {
        let mut sql = "begin immediate; ".to_owned();
        for (table, columns) in &self.tables {
            let columns = quoted(columns);
            sql.extend([
                format!("delete from {table}; "),
                format!("insert into {table} ({columns}) select {columns} from saved_{table}; "),
            ]);
        }
        self.run(sql + "commit").await;
    }

    pub async fn dump(&mut self) -> Dump {
        let sql: Vec<String> = self
            .tables
            .iter()
            .map(|(table, columns)| {
                let fields: Vec<String> = columns
                    .iter()
                    .map(|c| {
                        format!("'{c}', case typeof({c}) when 'blob' then hex({c}) else {c} end")
                    })
                    .collect();
                format!(
                    "select '{table}', json_object({}) from {table}",
                    fields.join(", ")
                )
            })
            .collect();
        let rows = sqlx::query(AssertSqlSafe(sql.join(" union all ")))
            .fetch_all(&mut self.connection)
            .await
            .expect("rows");
        let parse = |text: String| serde_json::from_str(&text).expect("is JSON");
        Dump::of(
            rows.iter()
                .map(|row| (row.get(0), object(parse(row.get(1)))))
                .collect(),
        )
    }
}

fn by_table(columns: Vec<(String, String)>) -> Tables {
    let mut tables: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (table, column) in columns {
        tables.entry(table).or_default().push(column);
    }
    assert!(tables.len() >= 7, "the tables are there: {tables:?}");
    tables.into_iter().collect()
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        other => panic!("not an object: {other}"),
    }
}
