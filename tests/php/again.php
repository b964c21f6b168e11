<?php

/*
 * Reads payloads, and writes them as PHP itself writes what it has read: php again.php php|json
 *
 * A line in hex each way. What cannot be read, or names a class that is not declared here, is a line that says so.
 */

declare(strict_types=1);

require __DIR__ . '/../../examples/php/wire.php';
require __DIR__ . '/classes.php';

function undeclared(string $class): void
{
    throw new UnexpectedValueException("$class is not declared");
}

function fail(int $level, string $text): never
{
    throw new ErrorException($text);
}

ini_set('unserialize_callback_func', 'undeclared');
ini_set('unserialize_max_depth', '0');
set_error_handler('fail');

$flags = JSON_THROW_ON_ERROR | JSON_UNESCAPED_SLASHES | JSON_UNESCAPED_UNICODE | JSON_PRESERVE_ZERO_FRACTION;
while (($line = fgets(STDIN)) !== false) {
    $payload = hex2bin(rtrim($line));
    try {
        $again = $argv[1] === 'json'
            ? json_encode(json_decode($payload, false, 512, JSON_THROW_ON_ERROR), $flags, 512)
            : serialize(unserialize($payload));
        echo bin2hex($again), "\n";
    } catch (Throwable $error) {
        echo str_replace("\n", ' ', $error->getMessage()), "\n";
    }
}
