<?php

/*
 * A master in PHP, which starts a slave in Python: php master.php PYTHON php|json
 *
 * The slave is in examples/php_master.py, which also starts this script.
 */

declare(strict_types=1);

use App\Message\Progress;
use App\Message\SettingRequest;
use App\Message\SettingResponse;
use App\Message\TaskRequest;
use StreamIpc\Message\LogMessage;
use StreamIpc\Message\Message;
use Wire\Session;

require __DIR__ . '/wire.php';
require __DIR__ . '/messages.php';

[, $python, $format] = $argv;
$command = [$python, '-m', 'examples.php_master', 'slave', $format];
// What the slave writes to its stderr goes to this one's.
$process = proc_open($command, [['pipe', 'r'], ['pipe', 'w'], STDERR], $pipes, dirname(__DIR__, 2));
$session = new Session($pipes[0], $pipes[1], $format, App\Message\CLASSES);

$session->onMessage = function (Message $message): void {
    if ($message instanceof Progress) {
        echo "  {$message->done} of {$message->total} words done\n";
    }
};

$session->onRequest = function (Message $request): ?Message {
    if (!$request instanceof SettingRequest) {
        return null;
    }
    echo "  Python wants to know: {$request->name}\n";
    return new SettingResponse('-');
};

$response = $session->request(new TaskRequest('stressed naïve drawer', ['upper' => true]));
echo "  Result: {$response->result}, done by {$response->doneBy()}\n";
echo '  Word lengths: ', json_encode($response->wordLengths, JSON_UNESCAPED_UNICODE), "\n";

try {
    $session->request(new TaskRequest(''));
} catch (RuntimeException $error) {
    [$first, $second] = explode("\n", $error->getMessage());
    echo "  An error: $first: $second\n";
}

$session->notify(new LogMessage('shutdown'));
fclose($pipes[0]);
fclose($pipes[1]);
echo '  Exit status of the slave: ', proc_close($process), "\n";
