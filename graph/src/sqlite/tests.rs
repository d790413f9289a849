//! What can only happen with a file.

use super::*;

#[tokio::test]
async fn a_file_of_a_newer_release_is_refused_with_both_versions() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("graph.db");
    let db = SqliteCheckpointer::open(&path).await.expect("opens");
    db.migrate().await.expect("migrates");
    db.migrate().await.expect("migrates again");
    let mut connection = single(&path).await;
    sqlx::query("insert into graph_migrations (version, description, success, checksum, execution_time) values (9000, 'x', true, x'00', 0)")
        .execute(&mut connection)
        .await
        .expect("a version from the future");
    let error = db.migrate().await.expect_err("is refused");
    assert!(
        matches!(
            error,
            StorageError::NewerSchema {
                found: 9000,
                known
            } if Some(known) == MIGRATIONS.iter().map(|m| m.version).max()
        ),
        "{error}"
    );
}

#[tokio::test]
async fn writing_goes_on_when_a_full_disk_has_room_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let db = SqliteCheckpointer::open(dir.path().join("graph.db"))
        .await
        .expect("opens");
    db.migrate().await.expect("migrates");
    let event = || NewEvent {
        stream: "s".to_owned(),
        name: "told".to_owned(),
        payload: serde_json::json!("x".repeat(100_000)),
        thread: None,
    };
    // It holds for this connection; the next one, which does not have it, is the disk with room.
    sqlx::query("pragma max_page_count = 1")
        .execute(&db.writer.pool)
        .await
        .expect("a limit");
    let error = db.append("1", event()).await.expect_err("there is no room");
    let cause = std::error::Error::source(&error).map(ToString::to_string);
    assert!(
        cause.is_some_and(|cause| cause.contains("disk is full")),
        "{error:?}"
    );
    db.append("2", event()).await.expect("there is room again");
}

#[tokio::test]
async fn the_file_is_written_with_full_synchronisation_and_a_log() {
    let dir = tempfile::tempdir().expect("a directory");
    let db = SqliteCheckpointer::open(dir.path().join("graph.db"))
        .await
        .expect("opens");
    let synchronous: i64 = sqlx::query_scalar("pragma synchronous")
        .fetch_one(&db.writer.pool)
        .await
        .expect("a value");
    assert_eq!(synchronous, 2, "2 is FULL");
    let mode: String = sqlx::query_scalar("pragma journal_mode")
        .fetch_one(&db.writer.pool)
        .await
        .expect("a value");
    assert_eq!(mode, "wal");
}
