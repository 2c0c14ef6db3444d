import java.io.IOException;
import java.io.RandomAccessFile;
import java.math.BigInteger;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.StandardOpenOption;
import java.security.KeyPairGenerator;
import java.security.MessageDigest;
import java.security.SecureRandom;
import java.security.Signature;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.UUID;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;
import java.util.stream.LongStream;
import java.util.zip.CRC32;

/** Files, threads, sockets, names, processes, random numbers, compiled code. Prints TAP. */
public class Check {
    interface Test {
        void run() throws Exception;
    }

    static int count = 0;

    static void test(String name, Test test) {
        count += 1;
        try {
            test.run();
            System.out.println("ok " + count + " - " + name);
        } catch (Throwable error) {
            error.printStackTrace();
            System.out.println("not ok " + count + " - " + name);
        }
    }

    static void require(boolean right) {
        if (!right) {
            throw new AssertionError();
        }
    }

    static String sha256(byte[] data) throws Exception {
        return HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(data));
    }

    static String output(String... command) throws Exception {
        Process process = new ProcessBuilder(command).redirectErrorStream(true).start();
        String text = new String(process.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
        require(process.waitFor() == 0);
        return text;
    }

    static void files(Path work) throws Exception {
        Path file = work.resolve("file");
        Files.write(file, new byte[1_000_000]);
        require(Files.size(file) == 1_000_000);
        Files.createLink(work.resolve("link"), file);
        Files.writeString(file, "more", StandardOpenOption.APPEND);
        require(Files.size(work.resolve("link")) == 1_000_004);
        require(Files.isSameFile(file, work.resolve("link")));
        Files.createDirectories(work.resolve("a/b"));
        Files.move(work.resolve("a"), work.resolve("c"), StandardCopyOption.ATOMIC_MOVE);
        require(Files.isDirectory(work.resolve("c/b")));
    }

    static void mapped(Path work) throws Exception {
        Path path = work.resolve("mapped");
        try (FileChannel channel = new RandomAccessFile(path.toFile(), "rw").getChannel()) {
            ByteBuffer buffer = channel.map(FileChannel.MapMode.READ_WRITE, 0, 1 << 20);
            for (int n = 0; n < 1 << 18; n++) {
                buffer.putInt(n);
            }
            channel.force(true);
        }
        CRC32 written = new CRC32();
        written.update(Files.readAllBytes(path));
        CRC32 wanted = new CRC32();
        ByteBuffer again = ByteBuffer.allocate(1 << 20);
        for (int n = 0; n < 1 << 18; n++) {
            again.putInt(n);
        }
        wanted.update(again.array());
        require(written.getValue() == wanted.getValue());
    }

    static void locked(Path work) throws Exception {
        Path path = work.resolve("locked");
        try (FileChannel channel =
                FileChannel.open(path, StandardOpenOption.CREATE, StandardOpenOption.WRITE)) {
            require(channel.tryLock() != null);
        }
    }

    static void threads() throws Exception {
        var pool = Executors.newFixedThreadPool(8);
        AtomicLong sum = new AtomicLong();
        List<Future<?>> all = new ArrayList<>();
        for (int task = 0; task < 64; task++) {
            all.add(pool.submit(() -> {
                for (int n = 0; n < 10_000; n++) {
                    sum.incrementAndGet();
                }
            }));
        }
        for (Future<?> each : all) {
            each.get();
        }
        pool.shutdown();
        require(pool.awaitTermination(60, TimeUnit.SECONDS));
        require(sum.get() == 640_000);
        require(LongStream.range(0, 1_000_000).parallel().sum() == 499_999_500_000L);
    }

    static void sockets() throws Exception {
        try (ServerSocket server = new ServerSocket(0, 16, InetAddress.getLoopbackAddress())) {
            Thread echo = new Thread(() -> {
                try (Socket socket = server.accept()) {
                    socket.getInputStream().transferTo(socket.getOutputStream());
                } catch (IOException error) {
                    throw new AssertionError(error);
                }
            });
            echo.start();
            byte[] data = new byte[50_000];
            new java.util.Random(1).nextBytes(data);
            try (Socket socket = new Socket("localhost", server.getLocalPort())) {
                socket.getOutputStream().write(data);
                socket.shutdownOutput();
                require(sha256(socket.getInputStream().readAllBytes()).equals(sha256(data)));
            }
            echo.join();
        }
    }

    static void http() throws Exception {
        var server = com.sun.net.httpserver.HttpServer.create(
            new InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0);
        server.createContext("/", exchange -> {
            byte[] body = exchange.getRequestURI().toString().getBytes(StandardCharsets.UTF_8);
            exchange.sendResponseHeaders(200, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        server.start();
        try {
            URI uri = URI.create("http://localhost:" + server.getAddress().getPort() + "/x?y");
            var answer = HttpClient.newHttpClient()
                .send(HttpRequest.newBuilder(uri).build(), HttpResponse.BodyHandlers.ofString());
            require(answer.body().equals("/x?y"));
        } finally {
            server.stop(0);
        }
    }

    static void signs(String type, String algorithm) throws Exception {
        var pair = KeyPairGenerator.getInstance(type).generateKeyPair();
        Signature signature = Signature.getInstance(algorithm);
        signature.initSign(pair.getPrivate());
        signature.update("text".getBytes());
        byte[] signed = signature.sign();
        signature.initVerify(pair.getPublic());
        signature.update("text".getBytes());
        require(signature.verify(signed));
    }

    static int mixed(int rounds) {
        int sum = 0;
        for (int n = 0; n < rounds; n++) {
            sum = sum * 31 + (n ^ (sum >>> 7));
        }
        return sum;
    }

    static void compiled() {
        int first = mixed(1000);
        for (int round = 0; round < 3000; round++) {
            require(mixed(1000) == first);
        }
    }

    static void collected() {
        long sum = 0;
        for (int n = 0; n < 2000; n++) {
            byte[] waste = new byte[100_000];
            waste[n] = 1;
            sum += waste[n];
        }
        require(sum == 2000);
    }

    public static void main(String[] arguments) throws Exception {
        Path work = Files.createTempDirectory("java-");
        test("files, links, a renamed folder", () -> files(work));
        test("a file is mapped", () -> mapped(work));
        test("a file is locked", () -> locked(work));
        test("threads", Check::threads);
        test("sockets", Check::sockets);
        test("HTTP", Check::http);
        test("localhost resolves", () -> require(InetAddress.getByName("localhost").isLoopbackAddress()));
        test("its own name resolves", () -> require(InetAddress.getLocalHost() != null));
        test("a process", () -> require(output("echo", "x").equals("x\n")));
        test("sha256 has the known answer", () -> require(sha256("abc".getBytes()).equals(
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")));
        test("EC signs", () -> signs("EC", "SHA256withECDSA"));
        test("Ed25519 signs", () -> signs("Ed25519", "Ed25519"));
        test("a prime", () -> require(new BigInteger(256, 50, new SecureRandom()).isProbablePrime(50)));
        test("compiled code is right", Check::compiled);
        test("garbage is collected", Check::collected);
        System.out.println("# own uuid " + UUID.randomUUID());
        System.out.println("# own random " + new SecureRandom().nextLong());
        System.out.println("1.." + count);
    }
}
