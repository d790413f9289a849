use std::net::{Ipv4Addr, TcpListener};
use std::ops::RangeInclusive;

use ports::{Allocations as _, ProjectId};
use store::Ports;

use crate::world::World;

on_both!(
    a_project_keeps_its_port,
    a_port_that_somebody_listens_on_is_not_given,
    a_port_to_avoid_is_left_for_another,
    a_full_range_is_said_so,
    processes_at_the_same_time_never_share_a_port,
    processes_give_one_project_one_port,
    a_released_port_is_free_again,
);

/// A range of ports in which nothing listens at the moment, found where the system gives none away by itself.
fn quiet_range(length: u16) -> RangeInclusive<u16> {
    let seed = uuid::Uuid::new_v4().as_u128();
    for step in 0..200_u128 {
        let first = 10_000 + u16::try_from((seed + step * 97) % 9_000).unwrap();
        let range = first..=first + length - 1;
        if range
            .clone()
            .all(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok())
        {
            return range;
        }
    }
    panic!("no quiet range of {length} ports below 20000");
}

fn project(number: usize) -> ProjectId {
    ProjectId::new(format!("p{number}"))
}

async fn a_project_keeps_its_port(world: &World) {
    let ports = Ports::new(&world.store, quiet_range(5));
    let first = ports.port(&project(1), None).await.unwrap();
    // Its own service listens on it by now.
    let _listens = TcpListener::bind((Ipv4Addr::LOCALHOST, first)).unwrap();
    assert_eq!(ports.port(&project(1), None).await.unwrap(), first);
    assert_ne!(ports.port(&project(2), None).await.unwrap(), first);
}

async fn a_port_that_somebody_listens_on_is_not_given(world: &World) {
    let range = quiet_range(3);
    let first = *range.start();
    let _stranger = TcpListener::bind((Ipv4Addr::LOCALHOST, first)).unwrap();
    let ports = Ports::new(&world.store, range);
    assert_eq!(ports.port(&project(1), None).await.unwrap(), first + 1);
}

async fn a_port_to_avoid_is_left_for_another(world: &World) {
    let range = quiet_range(4);
    let ports = Ports::new(&world.store, range);
    let first = ports.port(&project(1), None).await.unwrap();
    let second = ports.port(&project(1), Some(first)).await.unwrap();
    assert_ne!(second, first);
    // Said once more, as a repeated step does, it stays.
    assert_eq!(ports.port(&project(1), Some(first)).await.unwrap(), second);
    let third = ports.port(&project(1), Some(second)).await.unwrap();
    assert!(
        third != first && third != second,
        "{first} {second} {third}"
    );
}

async fn a_full_range_is_said_so(world: &World) {
    let ports = Ports::new(&world.store, quiet_range(2));
    for number in 0..2 {
        ports.port(&project(number), None).await.unwrap();
    }
    let failure = ports.port(&project(2), None).await.unwrap_err();
    assert_eq!(failure.kind, "no_free_port");
    assert!(failure.message.contains("artel.toml"), "{failure}");
}

async fn processes_at_the_same_time_never_share_a_port(world: &World) {
    let range = quiet_range(30);
    let mut tasks = Vec::new();
    for number in 0..4 {
        let store = world.another().await;
        let range = range.clone();
        tasks.push(tokio::spawn(async move {
            let ports = Ports::new(&store, range);
            let mut mine = Vec::new();
            for item in 0..5 {
                let project = project(number * 10 + item);
                mine.push(ports.port(&project, None).await.unwrap());
            }
            store.close().await;
            mine
        }));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.unwrap());
    }
    all.sort_unstable();
    let given = all.len();
    all.dedup();
    assert_eq!((given, all.len()), (20, 20));
}

async fn processes_give_one_project_one_port(world: &World) {
    let range = quiet_range(10);
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let store = world.another().await;
        let range = range.clone();
        tasks.push(tokio::spawn(async move {
            let port = Ports::new(&store, range).port(&project(1), None).await;
            store.close().await;
            port.unwrap()
        }));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await.unwrap());
    }
    all.dedup();
    assert_eq!(all.len(), 1, "{all:?}");
}

async fn a_released_port_is_free_again(world: &World) {
    let ports = Ports::new(&world.store, quiet_range(1));
    let port = ports.port(&project(1), None).await.unwrap();
    ports.port(&project(2), None).await.unwrap_err();
    ports.release(&project(1)).await.unwrap();
    assert_eq!(ports.port(&project(2), None).await.unwrap(), port);
}
