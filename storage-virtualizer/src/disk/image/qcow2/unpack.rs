//! Clusters that are compressed.

use std::io::Read;

use super::header::Compression;

/// Unpacks one cluster. What is left over behind it does not count.
pub(super) fn unpack(how: Compression, packed: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    match how {
        Compression::Zlib => inflate(packed, cluster),
        Compression::Zstd => zstd(packed, cluster),
    }
}

fn inflate(packed: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    let mut state = flate2::Decompress::new(false);
    let done = state.decompress(packed, cluster, flate2::FlushDecompress::Finish);
    match done {
        Ok(_) if usize::try_from(state.total_out()) == Ok(cluster.len()) => Ok(()),
        Ok(_) => Err("a compressed cluster ends too early"),
        Err(_) => Err("a compressed cluster is not what zlib makes"),
    }
}

fn zstd(packed: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    const WRONG: &str = "a compressed cluster is not what zstd makes";
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(packed).map_err(|_| WRONG)?;
    decoder.read_exact(cluster).map_err(|_| WRONG)
}
