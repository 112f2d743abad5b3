//! Disks that are served to nobody.

use std::sync::Mutex;

use api::{
    EventLog, Latencies, Problem, ProblemKind, RequestCounts, Share, ShareClient, ShareDisk, ShareKind,
    ShareStatus, SharedDisk, StorageAnswer, StorageRequest,
};

/// Has disks by name, and one client.
#[derive(Default)]
pub(crate) struct FakeShare {
    pub(crate) disks: Mutex<Vec<String>>,
    pub(crate) stopped: Mutex<bool>,
    pub(crate) events: EventLog,
}

pub(crate) fn disk(name: &str) -> SharedDisk {
    SharedDisk {
        name: name.to_owned(),
        source: format!("/images/{name}"),
        target: None,
        lun: None,
        socket: None,
        size: 4096,
        read_only: false,
        clients: 1,
        counts: Some(RequestCounts {
            reads: 5,
            ..RequestCounts::default()
        }),
        latencies: Some(Latencies::default()),
    }
}

fn missing(what: &str) -> Problem {
    Problem::new(ProblemKind::NotFound, "there is no such thing").about(what)
}

impl Share for FakeShare {
    fn status(&self) -> Result<ShareStatus, Problem> {
        Ok(ShareStatus {
            kind: ShareKind::Nbd,
            version: "1".to_owned(),
            pid: 1,
            uptime_seconds: 2,
            pool: None,
            addresses: vec!["/run/s".to_owned()],
            tls: None,
            targets: Vec::new(),
            disks: self.disks.lock().unwrap().iter().map(|name| disk(name)).collect(),
            clients: vec![ShareClient {
                id: "7".to_owned(),
                addresses: vec!["process 3".to_owned()],
                initiator: None,
                target: None,
                disk: None,
                since_ms: 3,
                counts: RequestCounts::default(),
            }],
        })
    }

    fn add(&self, wanted: ShareDisk) -> Result<SharedDisk, Problem> {
        let name = wanted.name.unwrap_or_default();
        self.disks.lock().unwrap().push(name.clone());
        Ok(disk(&name))
    }

    fn remove(&self, name: &str) -> Result<(), Problem> {
        let mut disks = self.disks.lock().unwrap();
        let place = disks.iter().position(|other| other == name);
        disks.remove(place.ok_or_else(|| missing(name))?);
        Ok(())
    }

    fn disconnect(&self, client: &str) -> Result<(), Problem> {
        match client {
            "7" => Ok(()),
            other => Err(missing(other)),
        }
    }

    fn stop(&self) -> Result<(), Problem> {
        *self.stopped.lock().unwrap() = true;
        Ok(())
    }

    fn events(&self) -> &EventLog {
        &self.events
    }

    fn storage(&self, _: StorageRequest) -> Result<StorageAnswer, Problem> {
        Err(missing("pool"))
    }
}
