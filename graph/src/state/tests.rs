use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::*;

fn longest(word: &mut String, other: &str) {
    if other.len() > word.len() {
        other.clone_into(word);
    }
}

#[derive(Clone, Debug, Default, PartialEq, crate::State)]
struct All {
    #[channel(append)]
    list: Vec<u8>,
    #[channel(merge)]
    map: BTreeMap<String, u8>,
    #[channel(merge)]
    set: BTreeSet<u8>,
    #[channel(reduce = |word: &mut String, other: String| longest(word, &other))]
    word: String,
    #[channel(reduce = Vec::push, update = u8)]
    pushed: Vec<u8>,
    maybe: Option<u8>,
    r#type: String,
}

fn update() -> AllUpdate {
    AllUpdate::default()
        .list(vec![1])
        .list(vec![2])
        .map([("a".to_owned(), 1)].into())
        .set([3].into())
        .word("long".into())
        .pushed(9)
        .maybe(Some(4))
        .r#type("t".into())
}

#[test]
fn an_update_goes_through_json_and_back() {
    let json = serde_json::to_value(update()).expect("is JSON");
    assert_eq!(
        json,
        json!({"list": [1, 2], "map": {"a": 1}, "set": [3], "word": "long", "pushed": 9, "maybe": 4, "type": "t"})
    );
    let back: AllUpdate = serde_json::from_value(json).expect("is an update");
    assert_eq!(
        format!("{back:?}"),
        "AllUpdate(list, map, set, word, pushed, maybe, type)"
    );
    let (mut one, mut other) = (All::default(), All::default());
    one.apply(update());
    other.apply(back);
    assert_eq!(one, other);
}

#[test]
fn an_update_is_read_by_reference_as_it_is_by_value() {
    let whole = serde_json::to_value(update()).expect("is JSON");
    for given in [
        whole,
        json!(null),
        json!({}),
        json!({"maybe": null}),
        json!({"nope": 1}),
        json!({"list": [1, "x"]}),
        json!({"map": {"a": -1}}),
        json!([1]),
        json!("text"),
    ] {
        let (by_reference, by_value) =
            (AllUpdate::read(&given), AllUpdate::from_json(given.clone()));
        match (by_reference, by_value) {
            (Ok(one), Ok(other)) => {
                assert_eq!(one.to_channels().ok(), other.to_channels().ok());
            }
            (Err(one), Err(other)) => {
                assert_eq!(crate::private::chain(&one), crate::private::chain(&other));
            }
            (one, other) => panic!("{given}: {one:?} and {other:?}"),
        }
    }
}

#[test]
fn an_input_that_was_read_leads_to_the_state_that_its_json_leads_to() {
    let json = serde_json::to_value(update()).expect("is JSON");
    let read = Input::read(json.clone(), update());
    assert_eq!(read, json);
    let row = || StateRow {
        checkpoint: 1,
        appends: Map::from_iter([("list".to_owned(), json!([3]))]),
        changes: Map::new(),
        snapshot: None,
        kept: None,
    };
    let snapshot = Map::from_iter([("word".to_owned(), json!("snapshot"))]);
    let with_snapshot = StateRow {
        snapshot: Some(snapshot),
        ..row()
    };
    for rows in [vec![], vec![row()], vec![row(), with_snapshot]] {
        let expected: All = rebuild(&json.clone().into(), rows.clone()).expect("fits");
        assert_eq!(rebuild::<All>(&read, rows).expect("fits"), expected);
    }
    // Of another type: the JSON counts.
    let other = Input::read(json.clone(), "another update");
    let expected: All = rebuild(&json.into(), Vec::new()).expect("fits");
    assert_eq!(rebuild::<All>(&other, Vec::new()).expect("fits"), expected);
}

#[test]
fn null_sets_an_optional_channel_to_nothing() {
    let mut all = All::default();
    all.apply(update());
    all.apply(AllUpdate::from_json(json!({"maybe": null})).expect("is an update"));
    assert_eq!(all.maybe, None);
    all.apply(AllUpdate::from_json(Value::Null).expect("changes nothing"));
    assert!(AllUpdate::from_json(json!([])).is_err());
}

#[test]
fn stored_changes_rebuild_the_state() {
    let mut changes = Changes::default();
    for update in [
        update(),
        AllUpdate::default().word("longer".into()).pushed(8),
    ] {
        changes.add::<All>(&update).expect("is JSON");
    }
    let row = StateRow {
        checkpoint: 1,
        appends: changes.appends,
        changes: changes.changes,
        snapshot: None,
        kept: None,
    };
    let mut expected = All::default();
    expected.apply(update());
    expected.apply(AllUpdate::default().word("longer".into()).pushed(8));
    let rebuilt: All = rebuild(&Value::Null.into(), vec![row.clone()]).expect("fits");
    assert_eq!(rebuilt, expected);
    // The same from a snapshot: only the appends before it and in it count.
    let row = StateRow {
        snapshot: Some(snapshot(&expected, Extent::Usual).expect("is JSON")),
        ..row
    };
    let rebuilt: All =
        rebuild(&json!({"word": "the very longest"}).into(), vec![row]).expect("fits");
    assert_eq!(rebuilt, expected);
}

#[test]
fn an_append_channel_in_a_snapshot_is_overwritten() {
    let rows = [json!([1]), json!([2])].map(|items| StateRow {
        checkpoint: 1,
        appends: Map::from_iter([("list".to_owned(), items)]),
        changes: Map::new(),
        snapshot: None,
        kept: None,
    });
    let mut rows = Vec::from(rows);
    rows[1].snapshot = Some(Map::from_iter([("list".to_owned(), json!([7]))]));
    let rebuilt: All = rebuild(&Value::Null.into(), rows).expect("fits");
    assert_eq!(rebuilt.list, [7]);
}

#[test]
fn channels_that_are_gone_are_passed_over_and_new_ones_have_their_default() {
    let row = StateRow {
        checkpoint: 1,
        appends: Map::from_iter([("was".to_owned(), json!([1]))]),
        changes: Map::from_iter([
            ("gone".to_owned(), json!(1)),
            ("maybe".to_owned(), json!(2)),
        ]),
        snapshot: None,
        kept: None,
    };
    let rebuilt: All = rebuild(&Value::Null.into(), vec![row]).expect("fits");
    assert_eq!((rebuilt.maybe, rebuilt.list.len()), (Some(2), 0));
}
