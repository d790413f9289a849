//! Every test body here runs twice: on SQLite and on PostgreSQL.

/// Makes two tests of each body in this module.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let world = crate::world::World::sqlite().await;
                    super::$name(&world).await;
                    world.end().await;
                }
            )*
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let world = crate::world::World::postgres().await;
                    super::$name(&world).await;
                    world.end().await;
                }
            )*
        }
    };
}

mod allocations;
mod buttons;
mod errands;
mod inbox;
mod journal;
mod leases;
mod opening;
mod outbox;
mod people;
mod projections;
mod record;
mod statuses;
mod workers;
mod world;
