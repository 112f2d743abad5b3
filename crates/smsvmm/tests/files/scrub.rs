//! What is rotten is found and repaired by command.

use std::fs;

use serde_json::{Value, json};

use crate::help::{noise, read, same, with_files, write};
use crate::place::{Place, text};

/// Flips a bit in the sector with these bytes, in so many devices at most; gives in how many.
fn rot(place: &Place, sector: &[u8], most: usize) -> usize {
    let mut rotten = 0;
    for name in ["d0.img", "d1.img", "d2.img", "d3.img"] {
        let mut image = fs::read(place.path(name)).unwrap();
        let found = image.chunks(512).position(|there| there == sector);
        if let Some(number) = found.filter(|_| rotten < most) {
            image[number * 512 + 7] ^= 1;
            fs::write(place.path(name), image).unwrap();
            rotten += 1;
        }
    }
    rotten
}

#[test]
fn a_scrub_repairs_what_has_a_good_copy_and_fails_for_the_rest() {
    let place = with_files();
    place.pool(&["file", "mkdir", "/safe", "--volume", "data", "--checksums", "yes"]);
    let content = noise(17, 1 << 20);
    write(&place, &["/safe/a"], &content);
    let said = place.pool(&["file", "scrub"]);
    assert!(said.contains("all is well"), "{said}");

    assert_eq!(rot(&place, &content[4096..4608], 1), 1);
    let said = place.pool(&["file", "scrub"]);
    assert!(said.contains("4K repaired, nothing is lost"), "{said}");
    let clean = place.json(&["file", "scrub"]);
    let answer = &clean["answer"]["scrubbed"];
    assert_eq!(
        (
            &answer["repaired"],
            &answer["lost"],
            &answer["findings"],
            &answer["whole"]
        ),
        (&json!(0), &json!(0), &json!([]), &json!(true))
    );
    same(&read(&place, &["/safe/a"]), &content);

    assert_eq!(rot(&place, &content[8192..8704], 2), 2);
    let output = place.run(&["file", "scrub", "--config", "vm.toml"]);
    let (out, err) = text(&output);
    assert_eq!(output.status.code(), Some(1), "{out}{err}");
    assert!(
        out.contains("/safe/a at 8192: ") && out.contains("4K have no good copy"),
        "{out}"
    );
    let output = place.run(&["file", "scrub", "--json", "--config", "vm.toml"]);
    assert_eq!(output.status.code(), Some(1));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["answer"]["scrubbed"]["lost"], 4096);
    assert_eq!(answer["answer"]["scrubbed"]["findings"][0]["object"], "/safe/a");
}

#[test]
fn a_repair_of_what_is_sound_changes_nothing_and_says_so() {
    let place = with_files();
    write(&place, &["/a"], &noise(3, 65536));
    assert!(place.pool(&["file", "check", "--repair"]).contains("all is well"));
    let mut told = place.json(&["file", "check", "--repair"]);
    told["answer"]["checked"]["metadata"] = json!(0);
    assert_eq!(
        told,
        json!({
            "answer": {"checked": {
                "findings": [], "unlisted": 0, "repair": true, "repaired": 0, "left": [],
                "files": 1, "directories": 1, "metadata": 0, "allocated": 65536,
            }},
            "events": [],
            "interrupted": false,
        })
    );
}
