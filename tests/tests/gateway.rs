//! An administrator elsewhere reconfigures the storage of a guest that is writing: through a gateway, with TLS, tokens and roles.

use std::fs;

use anyhow::{Result, ensure};
use stories::{Disk, Host, Pool, Server, story};

const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];
/// Writes, and reads what was written; counts, or says that it went wrong.
const LOAD: &str = "n=0\n\
    while dd if=/dev/urandom of=/vda/new bs=256k count=4 && sync && sha256sum /vda/new > /vda/sum && echo 3 > /proc/sys/vm/drop_caches && sha256sum -c /vda/sum\n\
    do n=$((n + 1)); echo $n > /rounds\n\
    done\n\
    echo failed > /rounds\n";
const ADDRESS: &str = "127.0.0.1:7443";

/// Makes somebody known; the file by which it comes.
fn principal(host: &Host, name: &str, role: &str) -> Result<String> {
    let said = host.administer(&format!("principal add {name} --role {role}"))?;
    let token = said.lines().next().unwrap_or_default();
    ensure!(token.starts_with("smsvmm_"), "{said}");
    fs::write(host.folder().join(format!("{name}.token")), token)?;
    let file = format!("{name}.toml");
    let text = format!(
        "[remote]\naddress = \"localhost:7443\"\nmachine = \"busy\"\nca = \"tls/ca.pem\"\ntoken-file = \"{name}.token\"\n"
    );
    fs::write(host.folder().join(&file), text)?;
    Ok(file)
}

fn gateway(host: &Host) -> Result<Server> {
    Server::speaking(
        host.smsvmm(),
        host.folder(),
        &["gateway", "gateway.toml"],
        "can be managed at",
    )
}

#[test]
fn storage_is_reconfigured_from_elsewhere_under_a_guest_that_writes() {
    story(|host| {
        for device in DEVICES {
            host.image(device, 2048)?;
        }
        let pool = Pool::create(host, &DEVICES)?;
        pool.run("disk create /vm/safe.dsk --size 96M --volume safe")?;
        let mut vm = pool
            .vm("busy")
            .cpus(2)
            .disk(Disk::in_pool("/vm/safe.dsk"))
            .file("/load", 0o644, LOAD)
            .interactive()?;
        vm.guest("mke2fs -q /dev/vda > /dev/null; mkdir /vda; mount -t ext4 /dev/vda /vda")?;
        vm.guest("sh /load > /dev/null 2>&1 & echo")?;

        host.administer("certificate init tls --host localhost --host 127.0.0.1")?;
        let root = principal(host, "root", "administrator")?;
        let looker = principal(host, "looker", "viewer")?;
        let text = format!(
            "listen = \"{ADDRESS}\"\ncertificate = \"tls/server.pem\"\nkey = \"tls/server.key\"\nclient-ca = \"tls/ca.pem\"\n\
             access = \"access.toml\"\naudit = \"audit.log\"\nmachines = [\"busy/vm.toml\"]\n"
        );
        fs::write(host.folder().join("gateway.toml"), text)?;
        let first = gateway(host)?;

        let status = host.administer(&format!("vm --config {looker} status"))?;
        assert!(status.contains("busy: running"), "{status}");
        let pool_status = host.administer(&format!("pool status --config {looker}"))?;
        assert!(pool_status.contains("safe"), "{pool_status}");
        let refused = host.run_smsvmm(&[
            "volume",
            "set-layout",
            "safe",
            "--layout",
            "raid5",
            "--config",
            &looker,
        ])?;
        assert!(
            !refused.success() && refused.text().contains("administrator"),
            "{}",
            refused.text()
        );

        host.administer(&format!("volume resize safe --size 640M --config {root}"))?;
        host.administer(&format!("disk snapshot --name noon /vm/safe.dsk --config {root}"))?;
        host.administer(&format!(
            "volume set-layout safe --layout raid5 --columns 3 --config {root}"
        ))?;
        // The gateway is killed and started again: the machine knows nothing of it.
        drop(first);
        let second = gateway(host)?;
        host.administer(&format!("volume set-layout safe --layout mirror --config {root}"))?;
        let out = host.administer(&format!("disk export /vm/safe.dsk@noon noon.raw --config {root}"))?;
        assert!(host.folder().join("noon.raw").exists(), "{out}");
        host.administer("principal revoke root")?;
        let refused = host.run_smsvmm(&["pool", "status", "--config", &root])?;
        assert!(
            !refused.success() && refused.text().contains("not known"),
            "{}",
            refused.text()
        );

        let rounds = vm.guest("cat /rounds")?;
        vm.guest_until(&format!("[ $(cat /rounds) != {} ]", rounds.trim()))?;
        assert!(rounds.trim().parse::<u32>().is_ok(), "{rounds}");
        assert_eq!(vm.guest("dmesg | grep -ci 'i/o error' || true")?, "0\n");
        second.end()?;
        let audit = fs::read_to_string(host.folder().join("audit.log"))?;
        for expected in ["resize-volume", "raid5", "mirror", "\"status\":403", "\"looker\""] {
            assert!(audit.contains(expected), "{expected}: {audit}");
        }
        vm.finish()?;
        pool.check()
    });
}
