<?php

/*
 * A slave in PHP, which talks to its master over stdin and stdout: php slave.php php|json
 *
 * examples/php_slave.py is its master. What it prints with echo would arrive there as a LogMessage of the level "junk".
 */

declare(strict_types=1);

use App\Message\Progress;
use App\Message\SettingRequest;
use App\Message\TaskRequest;
use App\Message\TaskResponse;
use StreamIpc\Message\Message;
use Wire\Session;

require __DIR__ . '/wire.php';
require __DIR__ . '/messages.php';

$session = new Session(STDOUT, STDIN, $argv[1] ?? 'php', App\Message\CLASSES);

$session->onRequest = function (Message $request) use ($session): ?Message {
    if (!$request instanceof TaskRequest) {
        return null;
    }
    if ($request->job === '') {
        throw new InvalidArgumentException('there is nothing to do');
    }
    $separator = $session->request(new SettingRequest('separator'))->value;
    $words = explode(' ', $request->job);
    $lengths = [];
    foreach ($words as $index => $word) {
        $lengths[$word] = strlen($word); // in bytes, as PHP counts
        $words[$index] = $request->options['upper'] ?? false ? strtoupper($word) : strrev($word);
        $session->notify(new Progress($index + 1, count($words)));
    }
    return new TaskResponse(implode($separator, $words), $lengths, 'PHP');
};

while ($session->tick()) {
    // Until the master closes its end.
}
