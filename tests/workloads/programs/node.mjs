// What node brings: cryptography, files, processes, workers, names, HTTP on loopback. Prints TAP.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import crypto from "node:crypto";
import dns from "node:dns/promises";
import { once } from "node:events";
import fs from "node:fs";
import http from "node:http";
import os from "node:os";
import path from "node:path";
import { pipeline } from "node:stream/promises";
import { Worker } from "node:worker_threads";
import zlib from "node:zlib";

const work = fs.mkdtempSync("/tmp/node-");
const at = (name) => path.join(work, name);
const sha256 = (data) => crypto.createHash("sha256").update(data).digest("hex");

async function serve(handler, use) {
  const server = http.createServer(handler).listen(0, "localhost");
  await once(server, "listening");
  try {
    return await use(`http://localhost:${server.address().port}`);
  } finally {
    server.closeAllConnections?.();
    server.close();
  }
}

function get(url) {
  return new Promise((resolve, reject) => {
    http.get(url, async (answer) => {
      const parts = [];
      for await (const part of answer) parts.push(part);
      resolve(Buffer.concat(parts));
    }).on("error", reject);
  });
}

function signs(type, options) {
  const { publicKey, privateKey } = crypto.generateKeyPairSync(type, options);
  const algorithm = type === "ed25519" ? null : "sha256";
  const signature = crypto.sign(algorithm, "text", privateKey);
  assert(crypto.verify(algorithm, "text", publicKey, signature));
  assert(!crypto.verify(algorithm, "other", publicKey, signature));
}

const tests = {
  "sha256 has the known answer": () =>
    assert.equal(
      sha256("abc"),
      "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    ),
  "pbkdf2 has the known answer": () =>
    assert.equal(
      crypto.pbkdf2Sync("password", "salt", 2, 20, "sha1").toString("hex"),
      "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957",
    ),
  "AES-GCM encrypts and decrypts": () => {
    const key = Buffer.alloc(32, 1);
    const iv = Buffer.alloc(12, 2);
    const cipher = crypto.createCipheriv("aes-256-gcm", key, iv);
    const secret = Buffer.concat([cipher.update("text"), cipher.final()]);
    const decipher = crypto.createDecipheriv("aes-256-gcm", key, iv).setAuthTag(cipher.getAuthTag());
    assert.equal(Buffer.concat([decipher.update(secret), decipher.final()]).toString(), "text");
  },
  "RSA signs": () => signs("rsa", { modulusLength: 2048 }),
  "EC signs": () => signs("ec", { namedCurve: "P-256" }),
  "ed25519 signs": () => signs("ed25519", {}),
  "X25519 agrees": () => {
    const [a, b] = [0, 1].map(() => crypto.generateKeyPairSync("x25519"));
    assert.deepEqual(
      crypto.diffieHellman({ privateKey: a.privateKey, publicKey: b.publicKey }),
      crypto.diffieHellman({ privateKey: b.privateKey, publicKey: a.publicKey }),
    );
  },
  "random bytes differ": () =>
    assert.equal(new Set(Array.from({ length: 1000 }, () => crypto.randomUUID())).size, 1000),
  "a file is written and read": () => {
    fs.writeFileSync(at("file"), "x".repeat(1e6));
    assert.equal(fs.readFileSync(at("file")).length, 1e6);
    assert.equal(fs.statSync(at("file")).size, 1e6);
  },
  "a hard link is the same file": () => {
    fs.writeFileSync(at("one"), "1");
    fs.linkSync(at("one"), at("two"));
    fs.appendFileSync(at("one"), "2");
    assert.equal(fs.readFileSync(at("two"), "utf8"), "12");
    assert.equal(fs.statSync(at("one")).ino, fs.statSync(at("two")).ino);
  },
  "a folder is renamed": () => {
    fs.mkdirSync(at("a/b"), { recursive: true });
    fs.writeFileSync(at("a/b/file"), "x");
    fs.renameSync(at("a"), at("c"));
    assert(fs.existsSync(at("c/b/file")));
  },
  "a folder is watched": async () => {
    const watcher = fs.watch(work);
    const changed = once(watcher, "change");
    fs.writeFileSync(at("watched"), "x");
    await changed;
    watcher.close();
  },
  "a file of the root is read": () => {
    const file = process.execPath;
    const told = execFileSync("sha256sum", [file]).toString().split(" ")[0];
    assert.equal(sha256(fs.readFileSync(file)), told);
  },
  "streams compress and decompress": async () => {
    await pipeline(fs.createReadStream(process.execPath), zlib.createGzip({ level: 1 }), fs.createWriteStream(at("gz")));
    await pipeline(fs.createReadStream(at("gz")), zlib.createGunzip(), fs.createWriteStream(at("back")));
    assert.equal(sha256(fs.readFileSync(at("back"))), sha256(fs.readFileSync(process.execPath)));
  },
  "HTTP on loopback": () =>
    serve(
      (request, answer) => answer.end(`${request.method} ${request.url}`),
      async (url) => assert.equal((await get(`${url}/x?y`)).toString(), "GET /x?y"),
    ),
  "a large answer, 20 times at once": () =>
    serve(
      (request, answer) => fs.createReadStream(at("file")).pipe(answer),
      async (url) => {
        const all = await Promise.all(Array.from({ length: 20 }, () => get(url)));
        assert(all.every((data) => data.length === 1e6));
      },
    ),
  "localhost resolves": async () => assert((await dns.lookup("localhost")).address),
  "its own name resolves": async () => assert((await dns.lookup(os.hostname())).address),
  "a process runs": () => assert.equal(execFileSync("echo", ["x"]).toString(), "x\n"),
  "a worker shares memory": async () => {
    const shared = new SharedArrayBuffer(4);
    const worker = new Worker(
      "Atomics.add(new Int32Array(require('worker_threads').workerData), 0, 7)",
      { eval: true, workerData: shared },
    );
    await once(worker, "exit");
    assert.equal(new Int32Array(shared)[0], 7);
  },
  "compiled code is right": () => {
    let sum = 0;
    for (let round = 0; round < 200; round++) for (let n = 0; n < 5000; n++) sum = (sum * 31 + n) | 0;
    let slow = 0n;
    for (let round = 0; round < 200; round++)
      for (let n = 0n; n < 5000n; n++) slow = BigInt.asIntN(32, slow * 31n + n);
    assert.equal(BigInt(sum), slow);
  },
  "a timer waits": async () => {
    const began = process.hrtime.bigint();
    await new Promise((resolve) => setTimeout(resolve, 200));
    assert(process.hrtime.bigint() - began >= 198_000_000n);
  },
  "the clock is later than this program": () => assert(Date.now() > Date.UTC(2024)),
};

let number = 0;
for (const [name, test] of Object.entries(tests)) {
  number += 1;
  try {
    await test();
    console.log(`ok ${number} - ${name}`);
  } catch (error) {
    console.error(name, error);
    console.log(`not ok ${number} - ${name}`);
  }
}
console.log(`# own uuid ${crypto.randomUUID()}`);
console.log(`# own random ${Math.random()}`);
console.log(`1..${number}`);
fs.rmSync(work, { recursive: true });
