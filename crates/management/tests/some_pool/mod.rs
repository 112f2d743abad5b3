//! What a machine could tell of its pool.

use api::storage::PoolStatus;

/// A pool in which something of everything is.
pub(crate) fn some_pool() -> PoolStatus {
    let pool = serde_json::json!({
        "name": "po\"ol\\1\n",
        "id": "00000000-0000-0000-0000-000000000001",
        "epoch": 7,
        "state": "degraded",
        "size": 1_u64 << 40,
        "used": 1 << 30,
        "devices": [{
            "id": "d0", "name": "/dev/sda", "uuid": "u", "state": "faulty", "size": 1_u64 << 40,
            "used": 5, "block": 512, "class": "ssd", "enclosure": "", "errors": 4,
        }],
        "volumes": [{
            "name": "v1", "id": "v", "state": "resyncing", "size": 1 << 30, "used": 2_u64 << 30, "block": 4096,
            "shape": {
                "layout": "mirror", "columns": 1, "copies": 2, "stripe-unit": 65536, "class": "",
                "devices": [],
            },
            "tolerates": 1, "read-policy": "balanced",
            "members": [{"section": 0, "column": 0, "devices": ["d0"], "size": 1 << 30, "state": "filling"}],
        }],
        "jobs": [
            {
                "id": 3, "kind": "resync", "what": "resync v1", "state": "running", "done": 10, "total": 20,
                "throttle": 0,
            },
            {
                "id": 2, "kind": "scrub", "what": "scrub", "state": "failed", "reason": "x", "done": 1,
                "total": 2, "throttle": 0,
            },
        ],
        "files": {
            "size": 100, "free": 50, "meta-size": 10, "meta-free": 5, "journal": 1,
            "volumes": [{
                "name": "v1", "class": "", "size": 100, "free": 50, "draining": true, "failed": false,
            }],
        },
        "notes": ["a note"],
    });
    serde_json::from_value(pool).unwrap()
}
